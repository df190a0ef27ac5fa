"""One model over several processes: launch, collectives, and the runner of each rank."""
