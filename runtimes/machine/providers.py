"""Execution providers that really work: each has computed a product, on itself, in a process of its own."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field

from ..benchmark.peaks import FP32_MATMUL
from .probe import run_probe


@dataclass(frozen=True)
class Providers:
    """ONNX Runtime's execution providers.

    Attributes:
        problems: by name, why a provider does not work, None for one that does.
        problem: why onnxruntime could not be asked at all.
    """

    problems: dict[str, str | None] = field(default_factory=dict)
    problem: str | None = None

    def works(self, name: str) -> bool:
        """Whether a provider computes here."""
        return name in self.problems and self.problems[name] is None


def find_providers() -> Providers:
    """Try every provider that the installed onnxruntime lists."""
    found = run_probe("probe_providers.py", base64.b64encode(FP32_MATMUL).decode())
    return Providers(found.get("providers", {}), found.get("problem"))
