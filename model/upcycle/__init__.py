"""Sparse upcycling: a dense Llama-family model becomes a Llama 4 mixture of experts that computes the same function.

Every part of a dense Llama layer has a place in a Llama 4 layer: attention with RoPE in every layer, no chunks, no
query/key norm; the feed-forward becomes a shared expert plus routed experts (``experts.py`` has the mathematics).
Training, for instance by distillation from the dense model, then lets the routed experts specialise
(Komatsuzaki et al. 2023, "Sparse Upcycling").
"""

from __future__ import annotations

from .convert import UpcycleReport, upcycle
from .dense import DenseModel
from .open import open_dense

__all__ = ["DenseModel", "UpcycleReport", "open_dense", "upcycle"]
