"""The calf: a herd member that herdgraph carries, for pictures without a download (``examples/train_calf.py`` made it).

3.6 million parameters that see emoji and name them; trained here on Google's drawings (Noto Emoji, Apache-2.0). Every
command that takes a checkpoint takes the name ``calf``.
"""

from __future__ import annotations

from pathlib import Path

NAME = "calf"
CALF = Path(__file__).parent / "checkpoint"
"""Its checkpoint, in Hugging Face layout."""
PICTURES = Path(__file__).parent / "pictures"
"""A few pictures that it was not trained on."""
