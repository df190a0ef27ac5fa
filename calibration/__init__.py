"""Measuring what flows through a model, so that weights are quantised by what they are used for."""
