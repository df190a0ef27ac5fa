"""Precision: storage formats, recipes that assign them, E4M3 rounding, and the calibration file."""
