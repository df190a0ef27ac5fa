"""Sound inputs of every kind, small."""

from __future__ import annotations

import json
import random
import tarfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from PIL import Image

from herdgraph.model.config.presets import TINY
from support import capture_cache

capture_cache.install()

TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}<|header_start|>{{ m.role }}<|header_end|>"
    "{% if m.name %}{{ m.name }}{% endif %}"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for p in m.content %}"
    "{{ '<|image|>' if p.type == 'image' else p.text }}{% endfor %}{% endif %}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|eot|>{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}<|header_start|>assistant<|header_end|>"
)


def picture() -> Image.Image:
    """A small picture."""
    return Image.linear_gradient("L").resize((40, 20)).convert("RGB")


def _herds() -> Any:
    """``support.herds``, which takes seconds to import: only who writes inputs needs it."""
    from benchmarks.peers import let_torchvision_import

    let_torchvision_import()
    from support import herds

    return herds


# -- files -------------------------------------------------------------------------------------------------------------


def write_processor(directory: Path) -> None:
    """Every file that travels with a checkpoint for text and pictures."""
    _herds().write_processor(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    generation = {"eos_token_id": [2, 508], "temperature": 0.6, "top_p": 0.9, "do_sample": True}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    images = {"max_patches": 4, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (directory / "preprocessor_config.json").write_text(json.dumps(images))


def write_checkpoint(directory: Path) -> None:
    """TINY in two safetensors files with an index."""
    _herds().save(TINY, directory, max_shard_size="200kB")
    write_processor(directory)


def write_meta_checkpoint(directory: Path) -> None:
    """A model in Meta's layout, two tensor-parallel files."""
    _herds()
    from support.meta_files import canonical, write_meta

    write_meta(directory, canonical()[1], 2)


def write_bundle(directory: Path) -> None:
    """TINY for the CPU, decoder and image tower."""
    from herdgraph.export.pipeline import build_bundle
    from herdgraph.model.checkpoint import open_checkpoint

    source = directory.with_name(f"{directory.name}.checkpoint")
    source.mkdir(exist_ok=True)
    write_checkpoint(source)
    directory.rmdir()
    with open_checkpoint(source) as checkpoint:
        build_bundle(checkpoint, directory)


def write_calibration(directory: Path) -> None:
    """A checkpoint and its FP8 calibration."""
    from support.command_line import run

    (directory / "checkpoint").mkdir()
    write_checkpoint(directory / "checkpoint")
    done = run("calibrate", directory / "checkpoint", "-o", directory / "calibration", "--tokens", 64, "--no-hessians")
    assert done.returncode == 0, done.stderr


def write_gguf(path: Path, *, odd: random.Random | None = None) -> None:
    """A dense Llama of two layers; with ``odd`` some metadata have another kind or value."""
    width, layers, heads, ffn = 32, 2, 4, 48
    writer, draw = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    symbols = [*sorted(_byte_symbols()), "ab"]
    fields: dict[str, Any] = {
        "llama.context_length": 256,
        "llama.embedding_length": width,
        "llama.block_count": layers,
        "llama.feed_forward_length": ffn,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 1e4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt2",
        "tokenizer.ggml.tokens": ["<|pad|>", "<|bos|>", "<|end|>", *symbols],
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * len(symbols)],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    for name, value in fields.items():
        _add_field(writer, name, value, odd if odd is not None and odd.random() < 0.1 else None)
    shapes = {"token_embd": (3 + len(symbols), width), "output_norm": (width,), "output": (3 + len(symbols), width)}
    for layer in range(layers):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_norm": (width,),
                "ffn_norm": (width,),
                "attn_q": (width, width),
                "attn_k": (width // 2, width),
                "attn_v": (width // 2, width),
                "attn_output": (width, width),
                "ffn_gate": (ffn, width),
                "ffn_up": (ffn, width),
                "ffn_down": (width, ffn),
            }.items()
        }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _byte_symbols() -> list[str]:
    from tokenizers import pre_tokenizers

    return list(pre_tokenizers.ByteLevel.alphabet())


def _add_field(writer: gguf.GGUFWriter, name: str, value: Any, odd: random.Random | None) -> None:
    if odd is not None:
        value = odd.choice((7, -1, 2**31, 1.5, float("nan"), "x", True, [1], ["x"], [1.5], [], [[1]]))
        if value in ([], [[1]]) or odd.random() < 0.2:
            return  # the field is missing
    if isinstance(value, list):
        writer.add_array(name, value)
    elif isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value) if value >= 0 else writer.add_int32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    else:
        writer.add_string(name, value)


def write_images(directory: Path) -> None:
    """Pictures in the formats and modes that people have."""
    base = Image.effect_noise((90, 60), 80)
    kinds = {
        "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
        "JPEG": ("L", "RGB", "CMYK"),
        "GIF": ("P", "L"),
        "WEBP": ("RGB", "RGBA"),
        "BMP": ("1", "L", "P", "RGB"),
        "TIFF": ("1", "L", "RGB", "RGBA", "CMYK", "F", "I;16"),
        "PPM": ("L", "RGB"),
        "ICO": ("RGBA",),
    }
    for form, modes in kinds.items():
        for mode in modes:
            image = base.convert("I").convert("I;16") if mode == "I;16" else base.convert(mode)
            image.save(directory / f"{mode.replace(';', '')}.{form.lower()}", form)
    frames = [base.convert("P"), base.rotate(90).convert("P")]
    frames[0].save(directory / "animated.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    base.convert("RGB").save(directory / "rotated.jpeg", exif=exif)


def write_videos(directory: Path) -> None:
    """Films and animations of a few frames."""
    from support import clips

    for kind, codec in (("mp4", "libx264"), ("mp4", "mpeg4"), ("webm", "libvpx"), ("webm", "libvpx-vp9")):
        (directory / f"{codec}.{kind}").write_bytes(clips.film(clips.frames(), kind=kind, codec=codec))
    for kind in ("gif", "webp"):
        (directory / f"a.{kind}").write_bytes(clips.animation(clips.frames(), kind=kind))


def write_data(directory: Path) -> None:
    """Rows, texts, pictures and a WebDataset tar."""
    picture().save(directory / "a.png")
    rows = [
        {"text": "plain"},
        {"text": "<|image|> seen", "images": ["a.png"]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "?"}]},
                {"role": "assistant", "content": "a gradient"},
            ]
        },
        {"text": "a film", "key": "film"},
        {"messages": [{"role": "user", "content": [{"video": ["a.png", "a.png"]}]}]},
    ]
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (directory / "text.txt").write_text("Some words. " * 100)
    with tarfile.open(directory / "shard.tar", "w") as archive:
        for name in ("a.png", "text.txt"):
            archive.add(directory / name, f"0001.{name.split('.')[1]}")
        (directory / "row.json").write_text(json.dumps({"text": "in a tar"}))
        archive.add(directory / "row.json", "0002.json")
    (directory / "row.json").unlink()
