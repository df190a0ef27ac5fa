"""Passes that split a decoder over ranks."""
