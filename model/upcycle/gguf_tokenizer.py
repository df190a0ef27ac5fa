"""The tokenizer inside a GGUF file as the files of a Hugging Face checkpoint.

A GGUF file names its pre-tokenizer (``tokenizer.ggml.pre``) instead of describing it; llama.cpp has one set of
regular expressions per name. Those of byte-level BPE tokenizers that dense Llama models come with are known here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from ...errors import HerdError
from ...reading import panics_refused
from .gguf_fields import field

_CONTROL, _USER_DEFINED = 3, 4
"""Values of ``tokenizer.ggml.token_type``: never part of text, and taken whole out of text."""

_END_OF_TURN = ("<|eot_id|>", "<|im_end|>")
"""End of turn in the chat formats of Llama 3 and ChatML, for files that mark only the end of text as EOS."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _llama3() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(_LLAMA3), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_PRE_TOKENIZERS = {"gpt2": _gpt2, "smollm": _smollm, "llama-bpe": _llama3}


class GgufTokenizer:
    """Special ids and tokenizer files out of GGUF metadata.

    Raises:
        HerdError: on construction, for a tokenizer that is not byte-level BPE or has an unknown pre-tokenizer.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        kind, self._pre = (field(metadata, f"tokenizer.ggml.{name}", str) for name in ("model", "pre"))
        if kind != "gpt2":
            raise HerdError(f"the GGUF tokenizer is of type {kind!r}, byte-level BPE (gpt2) is what can be converted")
        if self._pre not in _PRE_TOKENIZERS:
            raise HerdError(f"the GGUF pre-tokenizer is {self._pre!r}, known are {', '.join(_PRE_TOKENIZERS)}")
        self._metadata = metadata
        self._tokens: list[str] = field(metadata, "tokenizer.ggml.tokens", list[str]) or []
        self._types = field(metadata, "tokenizer.ggml.token_type", list[int]) or [1] * len(self._tokens)
        if len(self._types) != len(self._tokens):
            raise HerdError(f"the GGUF file has {len(self._tokens)} tokens and the types of {len(self._types)}: "
                            "get it again")
        self.bos_token_id = self._id("bos")
        self.pad_token_id = self._id("padding")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End of text, then every end of turn that differs from it."""
        turns = [token for token, kind in enumerate(self._types)
                 if kind == _CONTROL and self._tokens[token] in _END_OF_TURN]
        found = [self._id("eos"), self._id("eot"), self._id("eom"), *turns]
        return tuple(dict.fromkeys(token for token in found if token is not None))

    def files(self, context: int) -> dict[str, bytes]:
        """``tokenizer.json``, ``tokenizer_config.json`` and ``generation_config.json``.

        Args:
            context: tokens the model was trained for.

        Raises:
            HerdError: vocabulary and merges do not fit together.
        """
        generation = {
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        }
        return {
            "tokenizer.json": self._tokenizer().to_str().encode(),
            "tokenizer_config.json": _json(self._settings(context)),
            "generation_config.json": _json(generation),
        }

    @property
    def _add_bos(self) -> bool:
        # llama.cpp's rule: Llama 3 tokenizers begin with BOS unless the file says otherwise.
        given = field(self._metadata, "tokenizer.ggml.add_bos_token", bool)
        return self._pre == "llama-bpe" if given is None else given

    def _id(self, role: str) -> int | None:
        token = field(self._metadata, f"tokenizer.ggml.{role}_token_id", int)
        if token is not None and not 0 <= token < len(self._tokens):
            raise HerdError(f"the GGUF {role} token is {token}, outside of the {len(self._tokens)} tokens it has")
        return token

    def _text(self, token: int | None) -> str | None:
        return None if token is None else self._tokens[token]

    def _settings(self, context: int) -> dict[str, Any]:
        eos = self._id("eos")
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._text(self.bos_token_id),
            "eos_token": self._text(eos),
            "pad_token": self._text(self.pad_token_id),
            "add_bos_token": self._add_bos,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
            "chat_template": field(self._metadata, "tokenizer.chat_template", str),
        }
        return {name: value for name, value in settings.items() if value is not None}

    def _tokenizer(self) -> Tokenizer:
        vocabulary = {text: token for token, text in enumerate(self._tokens)}
        if len(vocabulary) != len(self._tokens):
            raise HerdError(f"{len(self._tokens) - len(vocabulary)} tokens of the GGUF vocabulary appear twice")
        found = field(self._metadata, "tokenizer.ggml.merges", list[str]) or []
        merges = [tuple(merge.split(" ", 1)) for merge in found]
        try:
            with panics_refused("making a tokenizer of the GGUF metadata"):
                return self._assembled(vocabulary, merges)
        except HerdError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise HerdError(f"the GGUF merges or special tokens do not fit its vocabulary: {_line(error)}") from error

    def _assembled(self, vocabulary: dict[str, int], merges: list[Any]) -> Tokenizer:
        # Llama 3 looks a whole word up before it merges: some of its words cannot be reached by merges.
        bpe = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=self._pre == "llama-bpe")
        tokenizer = Tokenizer(bpe)
        tokenizer.pre_tokenizer = _PRE_TOKENIZERS[str(self._pre)]()
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = self._post_processor()
        # Not normalized: matched in the text as it is, before the pre-tokenizer sees it.
        tokenizer.add_special_tokens(self._added(_CONTROL))
        tokenizer.add_tokens(self._added(_USER_DEFINED))
        return tokenizer

    def _added(self, kind: int) -> list[AddedToken]:
        texts = [text for text, found in zip(self._tokens, self._types, strict=True) if found == kind]
        return [AddedToken(text, normalized=False, special=kind == _CONTROL) for text in texts]

    def _post_processor(self) -> processors.PostProcessor:
        bos = self._text(self.bos_token_id)
        if not self._add_bos or bos is None:
            return processors.ByteLevel(trim_offsets=False)
        template = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B",
                                                 special_tokens=[(bos, self.bos_token_id)])
        return processors.Sequence([processors.ByteLevel(trim_offsets=False), template])


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
