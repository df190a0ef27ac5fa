"""Write the table of passes in docs/canonical-graph.md, from the targets themselves.

    python tools/passes_table.py [--check]

With ``--check`` nothing is written; the exit status is 1 when the page is not what the targets say.
"""

from __future__ import annotations

from pathlib import Path

from generated import write_or_check

from herdgraph.export.targets.describe import described_passes
from herdgraph.export.targets.registry import TARGETS, target_of

PAGE = Path(__file__).parents[1] / "docs" / "canonical-graph.md"
BEGIN, END = "<!-- passes: begin -->\n", "<!-- passes: end -->\n"


def table() -> str:
    """A row for every target and recipe, and below a row for every pass."""
    rows, purposes = [], {}
    for name, target in TARGETS.items():
        for recipe in target.recipes:
            passes = described_passes(*target_of(name, recipe))
            purposes |= dict(passes)
            rows.append(f"| `{name}` | `{recipe}` | {', '.join(each for each, _ in passes) or 'none'} |\n")
    return (
        "| target | recipe | passes, in order |\n|---|---|---|\n" + "".join(rows)
        + "\n| pass | what it does |\n|---|---|\n"
        + "".join(f"| `{name}` | {purpose} |\n" for name, purpose in sorted(purposes.items()))
    )


if __name__ == "__main__":
    write_or_check(PAGE, BEGIN, END, table())
