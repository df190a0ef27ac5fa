"""The ranges of pyproject.toml hold at their lower ends too, as `make test-lowest` proves."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    "cuda-bindings", "nvidia-cublas", "nvidia-cuda-runtime", "nvidia-curand", "onnxruntime-gpu", "ray", "tensorrt",
}
"""What no verb can run on a CPU, or in no minute."""


def test_lowest_versions_are_the_floors() -> None:
    """`lowest.txt` cannot drift from the ranges that users get."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    requirements = {*project["dependencies"]}.union(
        *(project["optional-dependencies"][extra] for extra in ("cpu", "gpu", "tensorrt", "build", "train", "cluster")))
    floors = {found[1]: found[2] for text in requirements if (found := re.match(r"([\w-]+)>=([\d.]+)", text))}
    lines = (ROOT / "tests/packaging/lowest.txt").read_text().splitlines()
    lowest = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: floor for name, floor in floors.items() if name not in ELSEWHERE} == lowest
