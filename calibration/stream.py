"""A model run layer by layer over all data: only one layer, and of its experts only one, is in memory at a time.

    embed all windows -> for each layer: attend window by window; feed forward, experts one by one -> head

Hidden states of all tokens live in one array [N, D] (a file, when they are to survive a kill). The mathematics is that
of ``model/llama4/decoder.py``, whose modules are used; only the routed experts are driven from here, because each of
them is read once for all tokens that it gets.

Shapes: N tokens of all windows, R rows of a block, D width, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..model.checkpoint.finite import require_finite
from ..model.checkpoint.reader import TensorReader
from ..model.llama4.decoder import Attention, Decoder, DecoderLayer, MixtureOfExperts, Positions
from ..model.llama4.model import constants
from ..model.llama4.operators import full_sequence_attention
from .matmul_backends import Exact, MatmulBackend, name_linears, set_backend

BLOCK = 4096
"""Rows of one product."""


@dataclass(frozen=True)
class States:
    """Hidden states of all windows.

    Attributes:
        x_ND: float32, windows one after another.
        lengths: tokens of each window.
    """

    x_ND: Tensor
    lengths: Sequence[int]

    def windows(self) -> Iterator[slice]:
        """Rows of each window."""
        begin = 0
        for length in self.lengths:
            yield slice(begin, begin + length)
            begin += length

    def blocks(self) -> Iterator[slice]:
        """Rows in blocks, whatever window they belong to."""
        for begin in range(0, len(self.x_ND), BLOCK):
            yield slice(begin, min(begin + BLOCK, len(self.x_ND)))


class Run(NamedTuple):
    """A model on its way through the layers: hidden states, changed in place, and what computes its products."""

    states: States
    backend: MatmulBackend


class RoutingHook(Protocol):
    """Learns where the router sends each token, and may have an expert run on more tokens."""

    def routed(self, layer: int, logits_NE: Tensor, chosen_Nk: Tensor) -> None:
        """Called once per layer, before its experts run."""

    def extra_tokens(self, layer: int, expert: int) -> Tensor:
        """Tokens [n] besides its own that an expert is to be run on; what comes out is thrown away."""


class DecoderStream:
    """The decoder of a checkpoint, a layer at a time, in float32."""

    def __init__(self, source: TensorReader) -> None:
        self.source, self.config = source, source.config
        with torch.device("meta"):
            self._decoder = Decoder(source.config)
        name_linears(self._decoder)
        for name, value in constants(source.config, self._decoder).items():
            owner, _, attribute = name.rpartition(".")
            setattr(self._decoder.get_submodule(owner), attribute, value)

    def embed(self, windows: Sequence[Sequence[int]], features: Sequence[Tensor | None]) -> Tensor:
        """Embeddings of all windows, image features where their tokens are: [N, D]. Only the rows needed are read."""
        ids = torch.tensor([token for window in windows for token in window])
        used, where = ids.unique(return_inverse=True)
        table = torch.stack([weight_of(self.source, "embed_tokens.weight", int(token)) for token in used])
        x_ND = table[where]
        given = [rows for rows in features if rows is not None]
        if given:
            x_ND[ids == self.config.image_token_id] = torch.cat(given)
        return x_ND

    @contextmanager
    def layer(self, index: int) -> Iterator[DecoderLayer]:
        """A layer with its weights, its experts excepted; they are dropped afterwards, and the backend with them."""
        layer = self._decoder.layers[index]
        assert isinstance(layer, DecoderLayer)
        with loaded(layer, self.source, f"layers.{index}.", without=".experts."):
            yield layer
        set_backend(layer, Exact())  # an observer holds the Hessians of its layer

    def attend(self, layer: DecoderLayer, runs: Sequence[Run]) -> None:
        """Add attention to the states of each run."""
        positions: dict[int, Positions] = {}
        for states, backend in runs:
            set_backend(layer, backend)
            for rows in states.windows():
                x_1TD = states.x_ND[rows][None]
                length = x_1TD.shape[1]
                if length not in positions:
                    positions[length] = self._decoder.positions(length, torch.zeros(1, dtype=torch.int64))
                normed_1TD = layer.input_layernorm(x_1TD)
                states.x_ND[rows] += self._attention(layer.self_attn, normed_1TD, positions[length], backend)[0]

    @staticmethod
    def _attention(attention: Attention, x: Tensor, positions: Positions, backend: MatmulBackend) -> Tensor:
        q, k, v = attention.project(x, positions)
        k, v = backend.cached(str(attention.q_proj.name).removesuffix(".q_proj.weight"), k, v)
        y = full_sequence_attention(
            q, k, v, num_heads=attention.num_heads, kv_heads=attention.kv_heads, chunk=attention.chunk
        )
        return attention.o_proj(y)

    def feed_forward(
        self, index: int, layer: DecoderLayer, runs: Sequence[Run], hook: RoutingHook | None = None
    ) -> None:
        """Add the feed-forward to the states of each run; a hook is for one run alone."""
        part, routed = layer.feed_forward, []
        for states, backend in runs:
            set_backend(layer, backend)
            if isinstance(part, MixtureOfExperts):
                routed.append(self._routed(layer, part, states, backend))
            else:
                for rows in states.blocks():
                    states.x_ND[rows] += part(layer.post_attention_layernorm(states.x_ND[rows]))
        if routed:
            self._experts(index, routed, hook)

    def _routed(self, layer: DecoderLayer, part: MixtureOfExperts, states: States, backend: MatmulBackend) -> _Routed:
        """Add the shared expert, and say where the router sends the tokens."""
        normed_ND = torch.empty_like(states.x_ND)
        logits_NE = torch.empty(len(states.x_ND), self.config.text.num_experts)
        for rows in states.blocks():
            normed_ND[rows] = layer.post_attention_layernorm(states.x_ND[rows])
            logits_NE[rows] = part.router(normed_ND[rows])
            states.x_ND[rows] += part.shared_expert(normed_ND[rows])
        chosen_Nk = logits_NE.topk(self.config.text.top_k, dim=-1).indices
        return _Routed(normed_ND, logits_NE, chosen_Nk, states.x_ND, backend)

    def _experts(self, index: int, runs: Sequence[_Routed], hook: RoutingHook | None) -> None:
        """Add the routed experts' outputs, each expert read once for all runs."""
        name = f"layers.{index}.feed_forward.experts"
        if hook:
            hook.routed(index, runs[0].logits_NE, runs[0].chosen_Nk)
        for expert in range(self.config.text.num_experts):
            own = [torch.where((run.chosen_Nk == expert).any(-1))[0] for run in runs]
            extra = hook.extra_tokens(index, expert) if hook else own[0][:0]
            if not any(map(len, (*own, extra))):
                continue
            weights = [weight_of(self.source, f"{name}.{part}", expert) for part in ("gate_up_proj", "down_proj")]
            for run, tokens in zip(runs, own, strict=True):
                for rows in tokens.split(BLOCK):
                    run.y_ND.index_add_(0, rows, run.expert_forward(name, expert, rows, weights))
            for rows in extra.split(BLOCK):
                runs[0].expert_forward(name, expert, rows, weights)

    def head_hessian(self, states: States) -> Tensor:
        """The Hessian [D, D] of the head's input, without the weight of the norm before it."""
        width, epsilon = self.config.text.hidden_size, self.config.text.rms_norm_eps
        hessian_DD = torch.zeros(width, width)
        for rows in states.blocks():
            x_RD = functional.rms_norm(states.x_ND[rows], (width,), eps=epsilon)
            hessian_DD.addmm_(x_RD.T, x_RD)
        return hessian_DD

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor, MatmulBackend], Tensor]]:
        """Final norm and head: from rows [R, D] and a backend to logits [R, V]."""
        tied = self.config.text.tie_word_embeddings
        name = "embed_tokens.weight" if tied else "lm_head.weight"
        weight_DV = weight_of(self.source, name).T
        with loaded(self._decoder.norm, self.source, "norm."):
            yield lambda x_RD, backend: backend(name, self._decoder.norm(x_RD), weight_DV)


@dataclass(frozen=True)
class _Routed:
    """Tokens x, where they go, and the states y to which the experts' outputs are added."""

    x_ND: Tensor
    logits_NE: Tensor
    chosen_Nk: Tensor
    y_ND: Tensor
    backend: MatmulBackend

    def expert_forward(self, name: str, expert: int, rows: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """An expert's output for some tokens: down(silu(gate(s x)) * up(s x)), s the sigmoid of its own logit."""
        gate_up_D2F, down_FD = weights
        x_RD = self.x_ND[rows] * torch.sigmoid(self.logits_NE[rows, expert])[:, None]
        gate, up = self.backend(f"{name}.gate_up_proj", x_RD, gate_up_D2F, expert).chunk(2, dim=-1)
        return self.backend(f"{name}.down_proj", functional.silu(gate) * up, down_FD, expert)


def weight_of(source: TensorReader, name: str, index: int | None = None) -> Tensor:
    """A tensor, or an entry of its first axis, in float32.

    Raises:
        HerdError: it holds a NaN or an infinity.
    """
    weight = source.read(name, index).float()
    require_finite(weight, name if index is None else f"{name} [{index}]")
    return weight


@contextmanager
def loaded(module: nn.Module, source: TensorReader, prefix: str, *, without: str = "\0") -> Iterator[None]:
    """Give a module on the meta device its weights in float32 for a while."""
    names = [name for name, _ in module.named_parameters() if without not in f".{name}"]
    weights = {name: weight_of(source, f"{prefix}{name}") for name in names}
    module.load_state_dict(weights, assign=True, strict=False)
    try:
        yield
    finally:
        empty = {name: weight.to("meta") for name, weight in weights.items()}
        module.load_state_dict(empty, assign=True, strict=False)
