"""Graphs over lists of tokens, fed in calls of several sequences, beside the canonical graph of the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import onnx_ir as ir
import onnxruntime

from herdgraph.export.graph.capture import capture_decoder
from herdgraph.export.weights.block import BlockRounder, filled_up
from herdgraph.export.weights.channel import channel_scales
from herdgraph.model.config import HerdConfig
from herdgraph.model.quantization.formats import BlockFormat, Format
from herdgraph.model.quantization.recipes import Recipe, is_table
from herdgraph.runtimes.native.library import library_path

Call = list[tuple[int, int, int]]
"""Parts of sequences: number, position of the first token, how many."""
_captured = cache(capture_decoder)


def canonical(config: HerdConfig, recipe: Recipe | None = None, seed: int = 0) -> ir.Model:
    """A canonical decoder with random weights; with those that a recipe makes of them, where it is given."""
    model, random = _captured(config).clone(), np.random.default_rng(seed)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            assert value.shape is not None
            shape = value.shape.numpy()
            noise = random.normal(size=shape) * (shape[-2] if len(shape) == 3 else shape[-1]) ** -0.5
            values = (1 + noise if len(shape) == 1 else noise * (8 if is_table(name) else 1)).astype(np.float32)
            value.const_value = ir.Tensor(values if recipe is None else meant(name, values, recipe), name=name)
    return model


def meant(name: str, values: np.ndarray, recipe: Recipe) -> np.ndarray:
    """What the codes of a weight stand for: [N, K], or experts [E, K, N]."""
    layout = recipe.layout_of(name)
    if values.ndim == 1 or layout is None or is_table(name):
        return values
    return np.stack([_meant(expert.T, layout).T for expert in values]) if values.ndim == 3 else _meant(values, layout)


def _meant(rows_NK: np.ndarray, layout: Format) -> np.ndarray:
    rows_NK = np.ascontiguousarray(rows_NK)
    if not isinstance(layout, BlockFormat):  # experts have a scale per channel
        scales = channel_scales(rows_NK).astype(ir.DataType.BFLOAT16.numpy()).astype(np.float32)
        return np.rint(rows_NK / scales[:, None]).clip(-127, 127) * scales[:, None]
    found = BlockRounder(layout).quantize(filled_up(rows_NK, layout.block)).values()
    return found.reshape(len(rows_NK), -1)[:, : rows_NK.shape[1]]


def schedule(lengths: Sequence[int], chunk: int, seed: int = 0) -> list[Call]:
    """Calls that read all sequences: prompts, single tokens and nothing at all side by side, never across a chunk."""
    random, at, calls = np.random.default_rng(seed), [0] * len(lengths), []
    while any(past < length for past, length in zip(at, lengths, strict=True)):
        call = []
        for number, (past, length) in enumerate(zip(at, lengths, strict=True)):
            left = min(length - past, chunk - past % chunk if chunk else length)
            if left and (random.random() < 0.8 or not call):
                count = min(left, int(random.choice([1, 1, 3, 8, 40])))
                call.append((number, past, count))
                at[number] += count
        calls.append(call)
    return calls


class Reference:
    """The canonical graph, one sequence at a time."""

    def __init__(self, model: ir.Model, config: HerdConfig) -> None:
        self.text, self.session = config.text, _session(model)

    def logits(self, ids: list[int], features: np.ndarray | None = None) -> np.ndarray:
        """Of all tokens of a sequence, in pieces of its chunks; features of images belong to the first."""
        text, found = self.text, []
        chunk = text.attention_chunk_size if any(map(text.chunk_of, range(text.num_layers))) else 0
        state = {f"past.{layer}.{part}": np.zeros((1, text.num_kv_heads, text.chunk_of(layer) or len(ids),
                                                   text.head_dim), np.float32)
                 for layer in range(text.num_layers) for part in ("key", "value")}
        images = {"image_features": features} if features is not None else {}
        for past in range(0, len(ids), chunk or len(ids)):
            part = ids[past : past + (chunk or len(ids))]
            logits, *presents = self.session.run(None, {
                "input_ids": np.array([part]), "past_lengths": np.array([past]), "logit_rows": np.arange(len(part)),
                **images, **state})
            state = dict(zip(state, presents, strict=True))
            images = {name: value[:0] for name, value in images.items()}
            found.append(logits[0])
        return np.concatenate(found)


class Lists:
    """A decoder over lists of tokens, its caches in blocks that are scattered over the pools.

    Args:
        model: lowered; attention is our operator or standard ones (``contrib_attention.py``).
        config: the model.
        lengths: of all sequences, in the end.
        block: tokens of a cache block.
    """

    def __init__(self, model: ir.Model, config: HerdConfig, lengths: Sequence[int], block: int = 64) -> None:
        self.session, self.block, text = _session(model), block, config.text
        self.inputs = {str(value.name): value for value in model.graph.inputs}
        self.chunk = max(map(text.chunk_of, range(text.num_layers)))
        random, self.tables = np.random.default_rng(1), {}
        for kind, most in (("global", lengths), ("chunked", [min(length, self.chunk) for length in lengths])):
            needed = [max(1, -(-count // block)) for count in most]
            free = iter(random.permutation(sum(needed)))
            self.tables[kind] = np.full((len(lengths), max(needed)), -1, np.int32)
            for row, count in zip(self.tables[kind], needed, strict=True):
                row[:count] = [next(free) for _ in range(count)]
        self.state = {name: self._pool(value) for name, value in self.inputs.items() if name.startswith("past.")}
        self.best: np.ndarray | None = None

    def _pool(self, value: ir.Value) -> np.ndarray:
        """Blocks that hold what nobody may read."""
        layer_is_chunked = "chunked" in str(value.shape[0])  # type: ignore[index]
        blocks = int(self.tables["chunked" if layer_is_chunked else "global"].max()) + 1
        rest = [self.block if isinstance(dim, ir.SymbolicDim) else dim for dim in list(value.shape or ())[1:]]
        assert value.dtype is not None
        return np.full((blocks, *rest), 77, value.dtype.numpy())

    def step(self, ids: list[list[int]], call: Call, features: np.ndarray | None = None) -> np.ndarray:
        """Logits [tokens, V] of one call."""
        numbers, pasts, counts = (np.array(column, np.int32) for column in zip(*call, strict=True))
        new = [ids[number][past : past + count] for number, past, count in call]
        tokens = [token for part in new for token in part]
        fed = {
            "input_ids": np.array(tokens), "logit_rows": np.arange(len(tokens)), "image_features": features,
            "positions": np.concatenate([np.arange(past, past + count) for _, past, count in call]),
            "cumulative_lengths": np.cumsum([0, *counts]).astype(np.int32), "past_lengths": pasts,
        }
        for kind, held in (("global", pasts), ("chunked", pasts % max(1, self.chunk))):
            bounds = np.array([counts.max(), (held + counts).max()], np.int32)
            fed |= {f"block_table.{kind}": self.tables[kind][numbers], f"past_lengths.{kind}": held,
                    f"attention_metadata.{kind}": bounds}
        given = {name: value for name, value in fed.items() if name in self.inputs}
        names = [item.name for item in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(None, given | self.state), strict=True))
        self.state = {name: found[name.replace("past", "present")] for name in self.state}
        self.best = found.get("best")
        return found["logits"]

    def logits(self, ids: list[list[int]], calls: list[Call]) -> list[np.ndarray]:
        """Of all tokens, by sequence."""
        found: list[list[np.ndarray]] = [[] for _ in ids]
        for call in calls:
            parts = np.split(self.step(ids, call), np.cumsum([count for *_, count in call])[:-1])
            for (number, *_), part in zip(call, parts, strict=True):
                found[number].append(part)
        return [np.concatenate(parts) for parts in found]


def compare(
    config: HerdConfig, lower: Callable[[ir.Model], None], recipe: Recipe, lengths: tuple[int, ...], block: int = 64,
) -> tuple[float, float]:
    """Largest difference of a lowered decoder's logits from the canonical one's, and their standard deviation."""
    model = canonical(config)
    lower(model)
    lists = Lists(model, config, lengths, block)
    found = lists.logits(_ids(lengths), schedule(lengths, lists.chunk))
    wanted = _wanted(config, recipe, lengths)
    gaps = [np.abs(some - all_).max() for some, all_ in zip(found, wanted, strict=True)]
    return float(max(gaps)), float(np.concatenate(wanted).std())


@cache
def _wanted(config: HerdConfig, recipe: Recipe, lengths: tuple[int, ...]) -> list[np.ndarray]:
    reference = Reference(canonical(config, recipe), config)
    return [reference.logits(ids) for ids in _ids(lengths)]


def _ids(lengths: tuple[int, ...]) -> list[list[int]]:
    random = np.random.default_rng(2)
    return [random.integers(3, 490, length).tolist() for length in lengths]


def _session(model: ir.Model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if "herdgraph.cpu" in model.opset_imports:
        options.register_custom_ops_library(str(library_path()))
    proto = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
