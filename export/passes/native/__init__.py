"""Passes that lower products, mixtures and full attention to our own CPU operators (docs/native.md)."""
