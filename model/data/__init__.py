"""Samples of text, conversations and pictures: one reader for calibration and training.

``open_samples`` opens files and directories, ``hold_out`` splits what they hold:

    train, held_out = hold_out(open_samples([Path("data")]), 0.01)
"""

from .held_out import hold_out
from .records import IMAGE, Picture, Record, Turn
from .sources import JsonLines, Samples, TextFile, open_samples
from .text_pages import TextPages

__all__ = [
    "IMAGE", "JsonLines", "Picture", "Record", "Samples", "TextFile", "TextPages", "Turn", "hold_out", "open_samples",
]
