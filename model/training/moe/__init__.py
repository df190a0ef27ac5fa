"""Mixtures of experts in training: dispatch, grouped products, load balancing."""
