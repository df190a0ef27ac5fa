"""What a teacher says about every token: all its logits, or its best ids and the rest.

Shapes: N tokens, V vocabulary, K kept ids of a token, S ids that a divergence sums over (V or K + 1).

p is the teacher's distribution and q the student's, both at temperature T: softmax(z / T). What weightings ask about
the teacher (``TeacherStats``) is always at T = 1.

================== ============================================ =====================================================
class              keeps of a token                             a divergence on it is
================== ============================================ =====================================================
``DenseTargets``   V logits                                     exact
``TopKTargets``    K best ids and the mass of all others        exact on K + 1 outcomes, hence never above the exact one
================== ============================================ =====================================================

Top-k alone, without an outcome for the rest, would teach the student that the tail does not exist (Anshumann et al.,
arXiv 2503.16870).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional

from ....errors import HerdError

FLOOR = -1e6
"""Stands for the logarithm of nothing: exp gives 0, and 0 times it is 0, which -inf would make NaN."""


class Pair(NamedTuple):
    """Both distributions on the ids that a divergence sums over, float32.

    Attributes:
        logp_NS: the teacher.
        logq_NS: the student, with its gradient.
    """

    logp_NS: Tensor
    logq_NS: Tensor


class TeacherStats(NamedTuple):
    """What a teacher at temperature 1 knows of each token, float32 [N] (``top_N`` int64)."""

    label_logprob_N: Tensor
    entropy_N: Tensor
    top_N: Tensor


@dataclass(frozen=True)
class Targets(ABC):
    """A teacher's view of N tokens. Tensors have a row per token; none has a gradient."""

    def __len__(self) -> int:
        return len(next(iter(self.tensors().values())))

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """V."""

    @abstractmethod
    def pair(self, logits_NV: Tensor, temperature: float) -> Pair:
        """Put a student's float32 logits beside the teacher.

        Raises:
            HerdError: the student has another vocabulary, or the targets were made at another temperature.
        """

    @abstractmethod
    def knowledge(self, labels_N: Tensor) -> TeacherStats:
        """What is known at temperature 1; labels of sparse targets are those they were made with."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The targets with every tensor changed, such as moved to another device."""
        return replace(self, **{name: change(value) for name, value in self.tensors().items()})

    def rows(self, index_M: Tensor) -> Self:
        """Targets of some of the tokens."""
        return self.map(lambda tensor: tensor[index_M])

    def require_vocabulary(self, found: int) -> None:
        """Refuse a student whose logits cannot mean the same ids.

        Raises:
            HerdError: another number of ids.
        """
        if found != self.vocabulary:
            raise HerdError(f"the teacher knows {self.vocabulary} ids, the student {found}: they need the same "
                            "tokenizer")

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields by name, each with a row per token."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def join(parts: Sequence[TopKTargets]) -> TopKTargets:
    """Targets of one kind, one after the other."""
    names = list(parts[0].tensors())
    joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return replace(parts[0], **joined)


@dataclass(frozen=True)
class DenseTargets(Targets):
    """All logits of a teacher, in any floating type."""

    logits_NV: Tensor

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.logits_NV.shape[-1]

    def pair(self, logits_NV: Tensor, temperature: float) -> Pair:
        """See ``Targets``."""
        self.require_vocabulary(logits_NV.shape[-1])
        return Pair(log_softmax(self.logits_NV, temperature), log_softmax(logits_NV, temperature))

    def knowledge(self, labels_N: Tensor) -> TeacherStats:
        """See ``Targets``."""
        logp_NV = log_softmax(self.logits_NV)
        entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
        return TeacherStats(_at(logp_NV, labels_N), entropy_N, self.logits_NV.argmax(-1))


@dataclass(frozen=True)
class TopKTargets(Targets):
    """The K best ids, best first, and the mass of all others, which become one outcome.

    Attributes:
        ids_NK: int32.
        logprobs_NK: log p of the ids, at ``temperature``.
        tail_N: mass of all other ids.
        logsumexp_N: of the logits over T; a logit is T (log p + logsumexp).
        label_logprob_N: log p of the label at temperature 1.
        entropy_N: at temperature 1, of the whole distribution.
        size: V.
        temperature: T.
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_N: Tensor
    logsumexp_N: Tensor
    label_logprob_N: Tensor
    entropy_N: Tensor
    size: int
    temperature: float

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.size

    def pair(self, logits_NV: Tensor, temperature: float) -> Pair:
        """See ``Targets``."""
        self.require_vocabulary(logits_NV.shape[-1])
        if temperature != self.temperature:
            raise HerdError(f"the teacher's targets were kept at temperature {self.temperature}, the loss uses "
                            f"{temperature}: use the same, or make the targets again")
        index_NK, logits_NV = self.ids_NK.long(), logits_NV / temperature
        total_N1 = logits_NV.logsumexp(-1, keepdim=True)
        logq_NK = logits_NV.gather(-1, index_NK) - total_N1
        # Log-probabilities that were rounded on disk no longer sum to 1 - tail: make them.
        logp_NK = log_softmax(self.logprobs_NK) + torch.log1p(-self.tail_N)[:, None]
        if index_NK.shape[1] == self.size:
            return Pair(logp_NK, logq_NK.clamp(min=FLOOR))
        # Summed over the others, not 1 - sum over these: a sure student leaves less to the rest than float32 resolves.
        rest_N1 = logits_NV.scatter(-1, index_NK, -torch.inf).logsumexp(-1, keepdim=True) - total_N1
        logp_NS = torch.cat((logp_NK, self.tail_N.log()[:, None]), -1)
        return Pair(logp_NS.clamp(min=FLOOR), torch.cat((logq_NK, rest_N1), -1).clamp(min=FLOOR))

    def knowledge(self, labels_N: Tensor) -> TeacherStats:
        """See ``Targets``."""
        return TeacherStats(self.label_logprob_N, self.entropy_N, self.ids_NK[:, 0].long())


def log_softmax(logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities at a temperature, in float32, finite even where a logit is -inf."""
    logits_NV = logits_NV.float() if temperature == 1 else logits_NV.float() / temperature
    return functional.log_softmax(logits_NV, dim=-1).clamp(min=FLOOR)


def _at(x_NV: Tensor, index_N: Tensor) -> Tensor:
    return x_NV.gather(-1, index_N[:, None])[:, 0]
