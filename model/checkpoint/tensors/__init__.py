"""Tensors that are read only when they are asked for, and views of them."""
