"""Samples of text, conversations and pictures: one reader for calibration and training."""
