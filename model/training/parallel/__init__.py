"""Training on several ranks: data, tensor and expert parallelism."""
