"""A tied table is packed once: rows and logits are those of the graph before, in the rotated basis too."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch

from herdgraph.export.memory_plan import bytes_of_ranks
from herdgraph.export.passes import LowerTiedTable
from herdgraph.export.weights.stream import Weight
from herdgraph.model.checkpoint.rotated import RotatedCheckpoint
from herdgraph.model.config.presets import TINY
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.model.quantization.recipes import EMBEDDING, HEAD, RECIPES
from support import graphs

ROWS, WIDTH = 70, 24
IDS = np.array([3, 69, 0, 3, 41])


class Source:
    """A checkpoint of a table and the last norm's weight."""

    def __init__(self, *, tied: bool = True) -> None:
        random = torch.Generator().manual_seed(0)
        self.table = torch.randn(ROWS, WIDTH, generator=random)
        self.gain = 1 + 0.5 * torch.rand(WIDTH, generator=random)
        text = replace(TINY.text, vocab_size=ROWS, hidden_size=WIDTH, tie_word_embeddings=tied)
        self.config = replace(TINY, text=text)

    def read(self, name: str, index: int | slice | None = None) -> torch.Tensor:
        tensor = self.gain if name == "norm.weight" else self.table
        return tensor if index is None else tensor[index]

    def logits(self) -> np.ndarray:
        """What the graph gives in exact arithmetic, of the tokens' own rows."""
        x = self.table.double()[torch.from_numpy(IDS)]
        n = x / x.square().mean(-1, keepdim=True).sqrt() * self.gain
        found: np.ndarray = (n @ self.table.double().T).numpy()
        return found


def _model(source: Source, *, rotated: bool, rows: int = ROWS) -> ir.Model:
    reader = RotatedCheckpoint(source) if rotated else source  # type: ignore[arg-type]
    model = graphs.parse(f"""
    g (int64[t] ids, float[{WIDTH}] gain, float[{rows}, {WIDTH}] table, float[{WIDTH}, {rows}] head)
        => (float[t, {rows}] y) <float[t, {WIDTH}] x> {{
        x = Gather <axis = 0> (table, ids)
        n = RMSNormalization <axis = -1, epsilon = 0.0> (x, gain)
        y = MatMul (n, head)
    }}""", gain=reader.read("norm.weight").numpy(), table=np.zeros((rows, WIDTH), np.float32),
        head=np.zeros((WIDTH, rows), np.float32))
    values = model.graph.initializers
    values["table"].const_value = Weight(reader, EMBEDDING, (rows, WIDTH))  # type: ignore[arg-type]
    values["head"].const_value = Weight(reader, HEAD if rotated else EMBEDDING, (rows, WIDTH), transposed=True)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize(("recipe", "rotated", "tolerance"), [
    ("fp32", False, 1e-5), ("fp32", True, 1e-5), ("int8", False, 0.03), ("int8", True, 0.03),
])  # fmt: skip
def test_rows_and_logits(recipe: str, rotated: bool, tolerance: float) -> None:
    source = Source()
    model = _model(source, rotated=rotated)
    assert LowerTiedTable(RECIPES[recipe])(model).modified
    assert graphs.operators(model) == {"Lookup": 1, "Project": 1 + rotated}
    assert sum(name.endswith(".codes") for name in model.graph.initializers) == 1 + rotated
    wanted = source.logits()
    assert np.abs(graphs.run(model, ids=IDS)[0] - wanted).max() < tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("untied", [_model(Source(tied=False), rotated=True), _model(Source(), rotated=True, rows=35)],
                         ids=["head of its own", "some rows"])
def test_what_is_not_one_table_stays(untied: ir.Model) -> None:
    assert not LowerTiedTable(RECIPES["int8"])(untied).modified
    assert graphs.operators(untied) == {"Gather": 1, "RMSNormalization": 1, "MatMul": 1}


@pytest.mark.parametrize(("recipe", "bytes_per_weight"), [("fp32", 4), ("int8", 1)])
def test_a_tied_model_takes_a_table_less(recipe: str, bytes_per_weight: int) -> None:
    tied = replace(TINY, text=replace(TINY.text, tie_word_embeddings=True))
    whole, single = (sum(bytes_of_ranks(config, RECIPES[recipe], ShardPlan(), packed=True)) for config in (TINY, tied))
    saved, width = whole - single, TINY.text.hidden_size
    scales = 4 * TINY.text.vocab_size if recipe == "int8" else 0
    mixing = 4 * (-(-width // 64) * 64) * (-(-width // 32) * 32) if recipe == "int8" else 0
    assert saved == bytes_per_weight * TINY.text.vocab_size * width + scales - mixing
