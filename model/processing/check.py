"""Whether a directory's tokenizer, chat template and image options work, tried before hours of building."""

from __future__ import annotations

from pathlib import Path

from ...errors import HerdError
from ..config import HerdConfig
from .generation_defaults import GenerationDefaults
from .prompt import PromptProcessor

_GREETING = [{"role": "user", "content": "Hello"}]
_VOCABULARIES = ("tokenizer.json", "tokenizer.model")


def check_processor(directory: Path, config: HerdConfig) -> None:
    """Open and try what a bundle's user will need; torch-free. A model may have no tokenizer, or no chat template.

    Args:
        directory: a checkpoint's files.
        config: the model.

    Raises:
        HerdError: a file that is there cannot be used, or belongs to another model.
    """
    GenerationDefaults.from_directory(directory)
    processor = PromptProcessor(directory, config)
    if config.vision:
        assert processor.image_processor, "its options are read"
    if not any((directory / name).exists() for name in _VOCABULARIES):
        return
    tokenizer = processor.tokenizer
    ids = tokenizer.encode_completion("Hello")
    if processor.has_template:
        ids += processor.template.encode(_GREETING, tokenizer)
    largest = max(ids, default=0)
    if largest >= config.text.vocab_size:
        raise HerdError(f"{directory} has a tokenizer that gives id {largest}, the model's vocabulary has "
                        f"{config.text.vocab_size}: is it this model's tokenizer?")
    tokenizer.decode(ids)
