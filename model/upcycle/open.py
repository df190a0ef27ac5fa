"""Opening a dense model, whatever kind of file it lies in."""

from __future__ import annotations

from pathlib import Path

from ...errors import HerdError
from .dense import DenseModel


def open_dense(source: Path) -> DenseModel:
    """Open a GGUF file of architecture ``llama`` or a Hugging Face directory with ``model_type`` ``llama``.

    Only headers and tokenizer files are read; every tensor is known to be there, with its shape, afterwards.

    Raises:
        HerdError: nothing there, not such a model, a feature that Llama 4 cannot express, or a damaged file.
    """
    from .gguf_source import open_gguf  # noqa: PLC0415  (each reader needs a library of its own)
    from .hf_source import open_hf  # noqa: PLC0415

    source = Path(source)
    if not source.exists():
        raise HerdError(f"{source} does not exist: give a GGUF file or a Hugging Face model directory")
    if not source.is_dir() and not source.is_file():
        raise HerdError(f"{source} is not a regular file: give a GGUF file or a Hugging Face model directory")
    model = open_hf(source) if source.is_dir() else open_gguf(source)
    _check_tensors(model, source)
    return model


def _check_tensors(model: DenseModel, source: Path) -> None:
    expected, found = model.expected_shapes(), model.tensors.shapes
    for name, shape in expected.items():
        if name not in found:
            raise HerdError(f"{source} has no tensor {name}: the file is incomplete")
        if found[name] != shape:
            raise HerdError(f"{source}: {name} has shape {list(found[name])}, its configuration gives {list(shape)}")
    # A tensor nobody asks for, such as a bias or an adapter, is part of the function that would be lost.
    unknown = sorted(found.keys() - expected.keys())
    if unknown:
        raise HerdError(f"{source} has {len(unknown)} tensors that a dense Llama has not, such as {unknown[0]}")
