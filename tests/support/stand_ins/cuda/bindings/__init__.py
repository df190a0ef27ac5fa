"""Stands where ``cuda-bindings`` would be found."""
