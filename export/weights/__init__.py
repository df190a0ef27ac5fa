"""Initializers that are read and converted only while they are written, and the formats they are written in."""
