"""Measurements. Each module prints what it measured and how; none of them asserts a timing."""
