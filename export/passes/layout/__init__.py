"""Passes that change how values are laid out or typed, not what is computed."""
