"""From a torch definition and a checkpoint to a bundle: canonical capture, passes, targets, weight streaming."""
