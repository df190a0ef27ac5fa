"""What an ONNX file says of itself, for loaders that know nothing of bundles.

Graphs of a bundle run on any ONNX Runtime; what else such a loader needs stands in the file's ``metadata_props``: how
to turn messages into tokens, when to stop, how large the caches are and where a call has to end (docs/onnx.md).
"""

from __future__ import annotations

import json

import onnx_ir as ir

from .. import __version__
from ..model.checkpoint import Checkpoint
from ..model.config import TextConfig, VisionConfig
from ..model.processing import PromptProcessor
from .passes.attention.paged import CACHE_TYPES
from .passes.native._weights import DOMAIN

PREFIX = "herdgraph."
_VOCABULARIES = ("tokenizer.json", "tokenizer.model")


def describe_graph(model: ir.Model, role: str, checkpoint: Checkpoint, *, target: str, recipe: str) -> None:
    """Write the properties of a lowered graph, all of them texts.

    Args:
        model: is changed.
        role: ``decoder``, ``vision``, or which partition of which rank.
        checkpoint: where it came from.
        target: name of the lowering.
        recipe: name of the precision recipe.
    """
    config = checkpoint.config
    found = {"version": __version__, "role": role, "target": target, "recipe": recipe}
    if role == "vision" and config.vision is not None:
        found |= _vision(config.vision, checkpoint)
    else:
        found |= _decoder(config.text, model) | _chat(checkpoint)
    model.metadata_props.update({PREFIX + name: value for name, value in found.items()})


def _decoder(text: TextConfig, model: ir.Model) -> dict[str, str]:
    """Sizes of the caches. A chunked layer has one chunk of slots, and no call may cross a multiple of it."""
    blocks: set[str] = {CACHE_TYPES[node.attributes["cache_type"].as_int()] for node in model.graph
                        if node.op_type == "PagedAttention" and node.domain == DOMAIN}
    types = blocks or {value.dtype.name.lower() for value in model.graph.inputs
                       if str(value.name).startswith("past.") and value.dtype is not None}
    return {
        "vocab_size": str(text.vocab_size), "context": str(text.max_position_embeddings),
        "layers": str(text.num_layers), "kv_heads": str(text.num_kv_heads), "head_dim": str(text.head_dim),
        "cache_type": ",".join(sorted(types)), "attention_chunk": str(text.attention_chunk_size),
        "chunked_layers": json.dumps([layer for layer, chunked in enumerate(text.chunked_layers) if chunked]),
    }


def _chat(checkpoint: Checkpoint) -> dict[str, str]:
    """Stops and chat template, as far as the checkpoint has a tokenizer."""
    if not any((checkpoint.directory / name).is_file() for name in _VOCABULARIES):
        return {}
    processor = PromptProcessor(checkpoint.directory, checkpoint.config)
    tokenizer = processor.tokenizer
    found = {"stop_token_ids": json.dumps(sorted(tokenizer.stop_ids))}
    if tokenizer.bos_id is not None:
        found["bos_token_id"] = str(tokenizer.bos_id)
    if processor.has_template:
        found["chat_template"] = processor.template.source
    return found


def _vision(vision: VisionConfig, checkpoint: Checkpoint) -> dict[str, str]:
    images = PromptProcessor(checkpoint.directory, checkpoint.config).image_processor
    return {
        "image_size": str(vision.image_size), "tokens_per_tile": str(vision.tokens_per_tile),
        "image_token_id": str(checkpoint.config.image_token_id), "image_mean": json.dumps(images.mean),
        "image_std": json.dumps(images.std), "max_tiles": str(images.max_patches),
    }
