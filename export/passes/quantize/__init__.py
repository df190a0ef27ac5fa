"""Passes that store weights, activations or caches in fewer bits."""
