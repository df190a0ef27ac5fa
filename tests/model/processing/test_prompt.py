"""Prompts against transformers' Llama 4 processor, token by token."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor
from transformers.models.llama4.processing_llama4 import Llama4Processor

from herdgraph.errors import HerdError
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import TINY
from herdgraph.model.processing import PromptProcessor
from support import herds


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompt")
    herds.write_processor(path)
    return path


@pytest.fixture(scope="module")
def ours(directory: Path) -> PromptProcessor:
    return PromptProcessor(directory, TINY)


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Llama4Processor:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    size = {"height": 28, "width": 28}
    return Llama4Processor(Llama4ImageProcessor(size=size, max_patches=4), tokenizer, patch_size=7)


def _picture(width: int, height: int) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


# Pictures of one tile, of 1 x 2, 2 x 1, 2 x 2 and 4 x 1 tiles.
@pytest.mark.parametrize("sizes", [
    [(28, 28)], [(56, 28)], [(28, 56)], [(50, 60)], [(20, 110)], [(28, 28), (60, 50)], [(56, 28), (28, 28), (9, 9)],
], ids=str)
def test_ids_match_transformers(sizes: list[tuple[int, int]], ours: PromptProcessor, theirs: Llama4Processor) -> None:
    pictures = [_picture(*size) for size in sizes]
    text = "Look: " + " and ".join("<|image|>" for _ in pictures) + " What?"
    found = ours.prepare(text, images=pictures)
    expected = theirs(text=text, images=pictures, return_tensors="pt", add_special_tokens=False)
    assert found.token_ids == expected["input_ids"][0].tolist()
    assert found.pixel_values is not None
    tiles = found.token_ids.count(TINY.image_token_id) // 4
    assert len(found.pixel_values) == tiles


def test_length_of_many_tiles(ours: PromptProcessor) -> None:
    """n tiles take (tokens + 1) n + tokens + 3 positions: 145 n + 147 for the released models' 144."""
    found = ours.prepare("<|image|>", images=[_picture(56, 56)])
    assert len(found.token_ids) == (4 + 1) * 4 + 4 + 3


def test_pictures_in_messages(ours: PromptProcessor) -> None:
    parts = [{"type": "image", "image": _picture(28, 28)}, {"type": "text", "text": "What?"}]
    found = ours.prepare([{"role": "user", "content": parts}])
    assert found.token_ids[:4] == [1, 506, *ours.tokenizer.encode("us")]
    assert found.token_ids.count(500) == 4
    assert found.pixel_values is not None
    assert found.pixel_values.shape == (1, 3, 28, 28)


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty": ("", {}, "the prompt is empty"),
    "no messages": ([], {}, "the prompt is empty"),
    "too few images": ("<|image|><|image|>", {"images": [_picture(9, 9)]}, "2 image placeholders and 1 images"),
    "too many images": ("no placeholder", {"images": [_picture(9, 9)]}, "0 image placeholders and 1 images"),
    "images beside messages": ([{"role": "user", "content": "x"}], {"images": [_picture(9, 9)]}, "into the messages"),
    "too long": ("x" * 5000, {}, "the prompt has 5000 tokens, the model's context is 4096"),
    "half a character": ("caf\udcc3", {}, r"the text holds '\\udcc3', which is no Unicode character"),
    "half a character in a message": ([{"role": "user", "content": "\udcff"}], {}, "no Unicode character"),
    "unknown role": ([{"role": "boss", "content": "x"}], {}, "role 'boss'"),
    "broken image": ("<|image|>", {"images": [b"nonsense"]}, "is not an image"),
}


@pytest.mark.parametrize("case", WRONG)
def test_prepare_refusals(case: str, ours: PromptProcessor) -> None:
    prompt, options, message = WRONG[case]
    with pytest.raises(HerdError, match=message):
        ours.prepare(prompt, **options)


def test_prompts_that_cannot_fit(ours: PromptProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused before the text is read into tokens, and before a picture too many is opened."""
    many = [{"role": "user", "content": [{"type": "image", "image": b"unread"}] * 5000}]
    with pytest.raises(HerdError, match=r"the prompt has 50.. tokens with 0 of its 5000 pictures, the model's context"):
        ours.prepare(many)
    monkeypatch.setattr(ours.tokenizer, "encode", None)
    for prompt in (" " * 10_000_000, [{"role": "user", "content": "x" * 1_000_000}]):
        with pytest.raises(HerdError, match=r"characters, which are more than \d+ tokens, at most 4096 are"):
            ours.prepare(prompt)


def test_missing_processor_parts(directory: Path, tmp_path: Path) -> None:
    text_only = PromptProcessor(directory, HerdConfig(text=TINY.text))
    with pytest.raises(HerdError, match="this model reads text only"):
        text_only.prepare("<|image|>", images=[_picture(9, 9)])
    assert text_only.prepare("plain").pixel_values is None
    nothing = PromptProcessor(tmp_path, TINY)
    with pytest.raises(HerdError, match=r"has no tokenizer\.json"):
        nothing.prepare("text")
    strange = PromptProcessor(directory, replace(TINY, text=replace(TINY.text, max_position_embeddings=3)))
    with pytest.raises(HerdError, match="context is 3"):
        strange.prepare("four")


def test_processing_is_torch_free() -> None:
    code = "import herdgraph.model.processing, sys; print(*{'torch', 'transformers', 'onnx'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
