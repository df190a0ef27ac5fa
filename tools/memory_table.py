"""Write the table of the real models' memory in README.md, from the planner itself.

    python tools/memory_table.py [--check]

With ``--check`` nothing is written; the exit status is 1 when the page is not what the planner says.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from generated import write_or_check

from herdgraph.export.planner.memory import weight_total
from herdgraph.export.planner.storage import Storage
from herdgraph.export.planner.traffic import cache_bytes
from herdgraph.model.config.presets import PRESETS

PAGE = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- memory: begin -->\n", "<!-- memory: end -->\n"
RECIPES = (("fp32", "cpu", "int8"), ("int8", "cpu", "int8"), ("int4", "cpu", "int8"), ("fp8", "gpu", "fp8"))
"""Recipe, kind of device, and the smaller type of its keys and values."""
CONTEXT = 128 << 10


def table() -> str:
    """A row for every recipe, a column for every model's weights, and keys and values in both types."""
    models = {name.capitalize(): PRESETS[name] for name in ("scout", "maverick")}
    rows = [f"| GB | {' | '.join(models)} | keys and values of 128k tokens |\n", "|---" * (2 + len(models)) + "|\n"]
    for recipe, device, small in RECIPES:
        kinds = [Storage.on(recipe, kv, cpu=device == "cpu") for kv in (None, small)]
        weights = [_gigabytes(weight_total(config, kinds[0])) for config in models.values()]
        caches = [_alike(cache_bytes(config.text, kind, CONTEXT) for config in models.values()) for kind in kinds]
        name = f"`{recipe}` on {'a CPU' if device == 'cpu' else 'GPUs'}"
        rows.append(f"| {name} | {' | '.join(weights)} | {caches[0]} ({kinds[0].kv}) or {caches[1]} ({small}) |\n")
    return "".join(rows)


def _alike(counts: Iterable[float]) -> str:
    """One figure for all models, whose keys and values have the same sizes."""
    (figure,) = set(map(_gigabytes, counts))
    return figure


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.{1 if count < 1e11 else 0}f}"


if __name__ == "__main__":
    write_or_check(PAGE, BEGIN, END, table())
