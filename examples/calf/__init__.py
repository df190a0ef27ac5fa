"""The calf: a Llama 4 model of 4.3 million parameters that sees emoji and names them, trained on one CPU.

It learned from drawings of six hands (``LICENCES``). Its checkpoint lies in the repository, not in the wheel: the demo
and the tests use it. ``train`` makes it again.
"""

from __future__ import annotations

from pathlib import Path

CALF = Path(__file__).parent / "checkpoint"
"""Its checkpoint, in Hugging Face layout."""
PICTURES = Path(__file__).parent / "pictures"
"""A few pictures that it was not trained on."""
