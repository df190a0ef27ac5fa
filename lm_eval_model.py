"""Bundles as a model of EleutherAI's lm-evaluation-harness, in this process and without a server.

    lm_eval --model herdgraph --model_args bundle=PATH --tasks ...
    python -m herdgraph.lm_eval_model --model herdgraph --model_args bundle=PATH --tasks ...

Releases of lm-eval after 0.4.13 find the model by its entry point; for earlier ones the second line registers it and
starts their own command line. A program imports this module first. Texts are divided into tokens and scored as by
``herdgraph eval``, so that both give the same log-likelihoods.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from itertools import groupby
from typing import Any, cast

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows
from tqdm import tqdm

from .errors import HerdError
from .runtimes import Engine
from .runtimes.evaluation.likelihood import EncodedPair, Scorer, check_pair, encode_pair, first_token
from .runtimes.executors.options import Memory

Request = tuple[tuple[str, str], list[int], list[int]]
"""Texts of context and continuation, and their tokens."""


@register_model("herdgraph")
class HerdgraphModel(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A bundle in lm-eval.

    Args:
        bundle: directory.
        threads: see ``Engine.load``.
        memory: see ``Engine.load``.
        max_length: tokens of a context, None for the model's.
        max_gen_toks: tokens of an answer, where a task does not say.
        options: lm-eval's own, such as a batch size: calls are as large as pays.
    """

    def __init__(
        self, bundle: str, threads: int | None = None, memory: str = "fast", max_length: int | None = None,
        max_gen_toks: int = 256, **options: Any,
    ) -> None:
        super().__init__()
        if unknown := sorted(options.keys() - {"batch_size", "max_batch_size", "device"}):
            raise HerdError(f"the model herdgraph has no argument {unknown[0]}: it takes bundle, threads, memory, "
                            "max_length and max_gen_toks")
        self._engine = Engine.load(bundle, threads=threads, memory=cast(Memory, memory))  # which checks it
        self._codec, self._scorer = self._engine.processor.tokenizer, Scorer(self._engine)
        most = self._engine.config.text.max_position_embeddings
        self.max_length, self.max_gen_toks = min(max_length or most, most), max_gen_toks

    # -- tokens --------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """What stands before a text without a context."""
        return first_token(self._codec)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text; those that the tokenizer puts in front come too, unless they are not wanted."""
        if add_special_tokens is False:
            return self._codec.encode(string, allow_special=True)
        return self._codec.encode_completion(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        ids, first = encode_pair(self._codec, context, continuation)
        return ids[:first], ids[first:]

    # -- log-likelihoods -----------------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False, **_options: Any) -> list[Any]:
        """Score requests; what is longer than the context loses its beginning, as with lm-eval's other models."""
        groups = [list(same) for _, same in groupby(requests, key=lambda request: request[1])]
        scores = self._scored([[self._fitted(*request[1:]) for request in group] for group in groups], disable_tqdm)
        found = [(score.total, score.greedy) for group in scores for score in group]
        for (texts, _, _), result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of the context's length; see ``lm_eval.api.model.LM``."""
        groups = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.eot_token_id, self.max_length - 1, 1)
            groups.append([self._fitted(seen[: len(seen) - len(wanted) + 1], wanted) for seen, wanted in windows])
        scores = self._scored([[pair] for group in groups for pair in group], disable_tqdm)
        totals = iter(score[0].total for score in scores)
        found = [sum(next(totals) for _ in group) for group in groups]
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return found

    def _fitted(self, context: list[int], continuation: list[int]) -> EncodedPair:
        if len(continuation) >= self.max_length:
            raise HerdError(f"a continuation has {len(continuation)} tokens, the context is {self.max_length}: choose "
                            "another task")
        context = context[-(self.max_length - len(continuation)) :]
        pair = EncodedPair([*context, *continuation], len(context))
        check_pair(self._engine.config, pair, "a request")
        return pair

    def _scored(self, groups: list[list[EncodedPair]], quiet: bool) -> list[Any]:
        with tqdm(total=len(groups), desc="herdgraph", disable=quiet) as bar:
            return self._scorer.score(groups, bar.update)

    # -- texts ---------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, which end before a stop string, at the model's own end or at the length limit."""
        found = []
        for request in tqdm(requests, desc="herdgraph", disable=disable_tqdm):
            context, options = request.args[:2]
            found.append(self._generated(context, options))
            self.cache_hook.add_partial("generate_until", (context, options), found[-1])
        return found

    def _generated(self, context: str, options: Mapping[str, Any]) -> str:
        until, most = options.get("until") or (), int(options.get("max_gen_toks", self.max_gen_toks))
        stop = [until] if isinstance(until, str) else list(until)
        sampled = bool(options.get("do_sample")) and options.get("temperature", 1.0) > 0
        sampling = {name: options.get(name) for name in ("temperature", "top_p", "top_k")} if sampled else {
            "temperature": 0.0}
        ids = (self.tok_encode(context) or [self.eot_token_id])[-max(1, self.max_length - most) :]
        return self._engine.generate(ids, max_new_tokens=most, stop=stop, repetition_penalty=1.0, **sampling).text

    # -- chat templates ------------------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval tells cached prompts apart by."""
        return str(self._engine.bundle.directory.resolve()).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Source of the checkpoint's template."""
        return self._engine.processor.template.source if chat_template else None

    def apply_chat_template(self, chat_history: Items[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """A chat as a prompt that ends where the answer begins."""
        if not add_generation_prompt:
            raise HerdError("an answer that has begun cannot be continued through the chat template: use a task "
                            "without gen_prefix")
        return self._engine.processor.template.render(_texts(chat_history))


def _texts(history: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": turn["role"], "content": turn["content"]} for turn in history]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
