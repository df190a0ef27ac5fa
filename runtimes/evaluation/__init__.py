"""What a bundle answers to the questions of known benchmarks: request files, log-likelihoods, accuracies."""
