"""A tied table is packed once: rows and logits are those of the graph before, in the rotated basis too."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch

from herdgraph.errors import HerdError
from herdgraph.export.memory_plan import bytes_of_ranks
from herdgraph.export.passes import LowerTiedTable
from herdgraph.export.passes.quantize._hessians import hessian_of_tied_head
from herdgraph.export.weights.block import BlockRounder, filled_up, inverse_cholesky_of
from herdgraph.export.weights.stream import Weight
from herdgraph.model.checkpoint.rotated import RotatedCheckpoint
from herdgraph.model.config.presets import TINY
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.model.quantization.formats import BlockFormat
from herdgraph.model.quantization.recipes import EMBEDDING, HEAD, RECIPES, Recipe, Rule
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


class Measured:
    """A calibration that saw the norm's results of all tokens of the table."""

    path = "calibration"

    def __init__(self, source: RotatedCheckpoint | None) -> None:
        self.source = source

    def knows_hessian(self, name: str) -> bool:
        return name == HEAD and self.source is not None

    def hessian(self, name: str, expert: int | None = None) -> torch.Tensor:
        assert (name, expert, bool(self.source)) == (HEAD, None, True)
        n_VD = torch.nn.functional.rms_norm(self.source.read(EMBEDDING), (WIDTH,))  # type: ignore[union-attr]
        return n_VD.T @ n_VD


def _in_bits(bits: int) -> Recipe:
    return replace(RECIPES["int4"], rules=(Rule("lm_head", BlockFormat(bits, 64)), *RECIPES["int4"].rules))


@pytest.mark.parametrize("bits", [4, 6])
def test_below_8_bits_logits_are_what_suffers_least(bits: int) -> None:
    """A third less than by nearest codes, in exact arithmetic behind the rounding; rows are what the head has."""
    source, errors, rows = Source(), [], []
    source.table[:, :] @= torch.diag(torch.linspace(0.1, 3, WIDTH))  # inputs that are not all alike
    rotated = RotatedCheckpoint(source)  # type: ignore[arg-type]
    mixing, table = rotated.tied_head_inputs(), rotated.read(EMBEDDING)
    n_VD = torch.nn.functional.rms_norm(table, (WIDTH,))
    for hessian in (None, hessian_of_tied_head(BlockFormat(bits, 64), Measured(rotated))):  # type: ignore[arg-type]
        codes = BlockRounder(BlockFormat(bits, 64)).quantize(
            filled_up(table.numpy(), 64), inverse_cholesky_of(ir.Tensor(table.numpy()), hessian, 64))
        found = torch.from_numpy(codes.values().reshape(ROWS, -1)[:, :WIDTH])
        errors.append(float((n_VD @ mixing @ (found - table).T).square().mean()))
        rows.append(found)
    assert errors[1] < 0.75 * errors[0]
    model = _model(source, rotated=True)
    assert LowerTiedTable(_in_bits(bits), Measured(rotated))(model).modified  # type: ignore[arg-type]
    looked_up = next(node for node in model.graph if node.op_type == "Lookup").outputs[0]
    model.graph.outputs.append(looked_up)
    np.testing.assert_allclose(graphs.run(model, ids=IDS)[1], rows[1][IDS], rtol=2e-3, atol=1e-4)


def test_below_8_bits_a_calibration_is_needed_that_knows_the_head() -> None:
    with pytest.raises(HerdError, match=r"calibration says nothing of lm_head\.weight, which is stored in 5 bits"):
        LowerTiedTable(_in_bits(5), Measured(None))(_model(Source(), rotated=True))  # type: ignore[arg-type]


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
