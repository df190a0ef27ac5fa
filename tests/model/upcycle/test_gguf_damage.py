"""GGUF files with metadata of the wrong kind, impossible counts and damaged tensors: each is one line."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from herdgraph.errors import HerdError
from herdgraph.model.upcycle import open_dense, upcycle
from herdgraph.model.upcycle.gguf_header import check_header
from support import dense

Add = Callable[[gguf.GGUFWriter], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return dense.save_gguf(tmp_path_factory.mktemp("gguf") / "dense.gguf").read_bytes()


def with_value(directory: Path, key: str, value: object, kind: gguf.GGUFValueType) -> Path:
    """The dense model with one value of its metadata replaced or added."""
    path, original = directory / "odd.gguf", gguf.GGUFWriter.add_key_value

    def add(writer: gguf.GGUFWriter, name: str, found: object, found_kind: gguf.GGUFValueType, *rest: object) -> None:
        if name != key:
            original(writer, name, found, found_kind, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_key_value", add)
        written = gguf.GGUFWriter.write_header_to_file

        def header(writer: gguf.GGUFWriter) -> None:
            original(writer, key, value, kind)
            written(writer)

        patch.setattr(gguf.GGUFWriter, "write_header_to_file", header)
        return dense.save_gguf(path)


T = gguf.GGUFValueType
KINDS: list[tuple[str, object, gguf.GGUFValueType, str]] = [
    ("general.architecture", 1, T.INT32, "a text is needed"),
    ("split.count", "x", T.STRING, "a whole number is needed"),
    ("llama.expert_count", "x", T.STRING, "a whole number is needed"),
    ("llama.rope.scaling.type", 3, T.INT32, "a text is needed"),
    ("llama.attention.head_count", "x", T.STRING, "a whole number is needed"),
    ("llama.attention.head_count", [1, 2], T.ARRAY, "a whole number is needed"),
    ("llama.attention.head_count", 0, T.UINT32, "one positive number is needed"),
    ("llama.attention.head_count", -1, T.INT32, "one positive number is needed"),
    ("llama.attention.head_count", 1.5, T.FLOAT32, "a whole number is needed"),
    ("llama.block_count", 1 << 62, T.UINT64, "layers, 1 to"),
    ("llama.rope.freq_base", "x", T.STRING, "a number is needed"),
    ("llama.rope.freq_base", [1.0], T.ARRAY, "a number is needed"),
    ("llama.rope.freq_base", float("nan"), T.FLOAT32, "a number is needed"),
    ("llama.attention.layer_norm_rms_epsilon", "x", T.STRING, "a number is needed"),
    ("llama.attention.layer_norm_rms_epsilon", float("inf"), T.FLOAT32, "a number is needed"),
    ("llama.rope.dimension_count", "x", T.STRING, "a whole number is needed"),
    ("tokenizer.ggml.model", 1, T.INT32, "a text is needed"),
    ("tokenizer.ggml.pre", ["gpt2"], T.ARRAY, "a text is needed"),
    ("tokenizer.ggml.tokens", 1, T.INT32, "a list of texts is needed"),
    ("tokenizer.ggml.tokens", [1, 2], T.ARRAY, "a list of texts is needed"),
    ("tokenizer.ggml.token_type", "x", T.STRING, "a list of whole numbers is needed"),
    ("tokenizer.ggml.token_type", [3, 3], T.ARRAY, "300 tokens and the types of 2"),
    ("tokenizer.ggml.merges", 7, T.INT32, "a list of texts is needed"),
    ("tokenizer.ggml.merges", ["nospace"], T.ARRAY, "do not fit its vocabulary"),
    ("tokenizer.ggml.bos_token_id", "x", T.STRING, "a whole number is needed"),
    ("tokenizer.ggml.bos_token_id", -1, T.INT32, "bos token is -1, outside"),
    ("tokenizer.ggml.add_bos_token", "yes", T.STRING, "true or false is needed"),
    ("tokenizer.chat_template", 1, T.INT32, "a text is needed"),
    ("general.alignment", 3, T.UINT32, "cannot be read as GGUF"),
]


@pytest.mark.parametrize(("key", "value", "kind", "message"), KINDS, ids=[f"{key}={value}" for key, value, *_ in KINDS])
def test_metadata_of_the_wrong_kind(
    key: str, value: object, kind: gguf.GGUFValueType, message: str, tmp_path: Path
) -> None:
    path = with_value(tmp_path, key, value, kind)
    with pytest.raises(HerdError, match=message) as caught:
        open_dense(path)
    assert "\n" not in str(caught.value)


def head(*, tensors: int = 0, pairs: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


COUNTS = {
    "pairs": (head(pairs=1 << 60), "number of metadata pairs of .* is 1152921504606846976"),
    "tensors": (head(tensors=1 << 60), "number of tensors of .* is 1152921504606846976"),
    "length of a key": (head(pairs=1, rest=struct.pack("<Q", 1 << 62)), "length of a text of"),
    "array of numbers": (head(pairs=1, rest=text(b"a") + struct.pack("<IIQ", 9, 4, 1 << 60)), "entries of an array of"),
    "array cut off": (head(pairs=1, rest=text(b"a") + struct.pack("<IIQ", 9, 4, 1000)), "damaged or cut off"),
    "array of arrays": (head(pairs=1, rest=text(b"a") + struct.pack("<IIQ", 9, 9, 1)), "an array of the type 9"),
    "unknown type": (head(pairs=1, rest=text(b"a") + struct.pack("<I", 77)), "a value of the type 77"),
    "axes": (head(tensors=1, rest=text(b"a") + struct.pack("<I", 1 << 30)), "number of axes of a tensor"),
    "no axes": (head(tensors=1, rest=text(b"a") + struct.pack("<I", 0)), "size of a tensor"),
    "size": (head(tensors=1, rest=text(b"a") + struct.pack("<IQQIQ", 2, 1 << 32, 1 << 32, 0, 0)), "size of a tensor"),
    "type of a tensor": (head(tensors=1, rest=text(b"a") + struct.pack("<IQIQ", 1, 4, 99, 0)), "cannot be read"),
    "place of a tensor": (head(tensors=1, rest=text(b"a") + struct.pack("<IQIQ", 1, 4, 0, 1 << 62)), "cannot be read"),
    "key twice": (head(pairs=2, rest=2 * (text(b"a") + struct.pack("<II", 4, 1))), "cannot be read as GGUF"),
    "key not UTF-8": (head(pairs=1, rest=text(b"\xff") + struct.pack("<II", 4, 1)), "cannot be read as GGUF"),
    "version": (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "cannot be read as GGUF"),
}


@pytest.mark.parametrize("case", COUNTS)
def test_counts_are_compared_with_the_file(case: str, tmp_path: Path) -> None:
    content, message = COUNTS[case]
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(HerdError, match=message) as caught:
        open_dense(tmp_path / "x.gguf")
    assert "\n" not in str(caught.value)


def test_flipped_bytes_of_the_head_are_one_line_or_harmless(whole: bytes, tmp_path: Path) -> None:
    random, refusals = np.random.default_rng(0), 0
    for _ in range(60):
        content = bytearray(whole)
        content[int(random.integers(8, 1500))] ^= int(random.integers(1, 256))
        (tmp_path / "x.gguf").write_bytes(content)
        try:
            open_dense(tmp_path / "x.gguf")
        except HerdError as error:
            assert "\n" not in str(error)  # noqa: PT017 - some flips change only a text
            refusals += 1
    assert refusals > 10


def test_the_head_of_a_whole_file_passes(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(whole)
    check_header(tmp_path / "x.gguf")


def test_weights_that_are_not_finite_are_named(whole: bytes, tmp_path: Path) -> None:
    content = bytearray(whole)
    content[-4:] = struct.pack("<f", float("nan"))
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(HerdError, match=r"layers\.1\.\S+ holds a NaN at \["):
        upcycle(tmp_path / "x.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_written_weights_have_the_mode_of_other_files(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(whole)
    upcycle(tmp_path / "x.gguf", tmp_path / "out")
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1
