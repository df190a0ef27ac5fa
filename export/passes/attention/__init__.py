"""Lowerings of ``CachedAttention``."""
