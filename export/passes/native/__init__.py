"""Passes that lower products and mixtures to our own CPU operators (docs/native.md)."""
