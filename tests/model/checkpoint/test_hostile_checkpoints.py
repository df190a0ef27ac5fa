"""Checkpoints whose numbers, names and kinds are made up: each is one line, and nothing of a made-up size is made."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from herdgraph.errors import HerdError
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.checkpoint.base import Checkpoint
from herdgraph.model.checkpoint.huggingface import fuse_experts, shards_of
from herdgraph.model.checkpoint.meta.checkpoint import _load, _numbered
from herdgraph.model.checkpoint.quantized import with_scales
from herdgraph.model.checkpoint.tensors.header import read_header
from herdgraph.model.checkpoint.tensors.lazy import Index
from herdgraph.model.checkpoint.tensors.write import write_tensors
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import TINY
from support import herds

EXPERTS = "layers.0.feed_forward.experts"


@dataclass(frozen=True)
class Stored:
    """A tensor that is in memory already."""

    value: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    def read(self, index: Index = None) -> torch.Tensor:
        return self.value.clone() if index is None else self.value[index].clone()


def refused(match: str, call: Callable[[], object]) -> None:
    with pytest.raises(HerdError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900


@pytest.mark.parametrize("index", [7, 999_999_999])
def test_experts_end_at_the_first_gap(index: int) -> None:
    tensors = {f"{EXPERTS}.{index}.gate_proj.weight": Stored(torch.ones(2, 2))}
    refused(r"experts\.0 has no gate_proj: a shard is missing", lambda: fuse_experts(tensors))


@pytest.mark.parametrize("index", ["9" * 5000, "1000000000", "01", "\u0663"])
def test_indices_that_are_none_are_unknown_tensors(index: str, tmp_path: Path) -> None:
    herds.save(herds.variant(num_layers=1, moe_layers=(), rope_layers=(True,), chunked_layers=(True,)), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"model.{EXPERTS}.{index}.up_proj.weight"] = torch.ones(2, 2)
    write_tensors(tensors, tmp_path / "model.safetensors")
    refused("has a tensor layers.0.feed_forward.experts|has a tensor 'layers", lambda: open_checkpoint(tmp_path))


def test_an_expert_must_be_a_matrix() -> None:
    name = f"{EXPERTS}.0.gate_proj.weight"
    refused("has 1 axes, a matrix is needed", lambda: fuse_experts({name: Stored(torch.ones(2))}))


def safetensors(path: Path, header: str, data: bytes = b"") -> Path:
    text = header.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


ENTRY = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
HEADERS = {
    "key twice": (f"{{{ENTRY},{ENTRY}}}", "the key 'a' is given twice"),
    "field twice": ('{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "the key 'dtype' is given"),
    "NaN": ('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', "NaN is no JSON number"),
    "size of many digits": (f'{{"a":{{"dtype":"F32","shape":[{"9" * 5000}],"data_offsets":[0,4]}}}}', "Expected `int`"),
    "size a text": ('{"a":{"dtype":"F32","shape":["1"],"data_offsets":[0,4]}}', "Expected `int`, got `str`"),
    "negative size": ('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "a negative size"),
    "negative place": ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}', "a negative size or place"),
    "place of one number": ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}', "length 2"),
    "no place": ('{"a":{"dtype":"F32","shape":[1]}}', "missing required field `data_offsets`"),
    "type a number": ('{"a":{"dtype":1,"shape":[1],"data_offsets":[0,4]}}', "Expected `str`, got `int`"),
    "entry a list": ('{"a":[]}', "Expected `object`, got `array`"),
    "wrong place": ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,3]}}', "is damaged or cut off"),
    "huge product": ('{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}', "is damaged"),
    "overlap": (f'{{{ENTRY},"b":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}', "is damaged or cut off"),
    "nested": ("[" * 100_000, "nested too deeply"),
    "metadata a number": (f'{{"__metadata__":1,{ENTRY}}}', "is damaged or cut off"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_every_damaged_header_is_one_line(case: str, tmp_path: Path) -> None:
    header, message = HEADERS[case]
    path = safetensors(tmp_path / "x.safetensors", header, bytes(4))
    refused(message, lambda: read_header(path))


def test_a_header_is_not_read_beyond_what_any_has(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((4 << 30).to_bytes(8, "little"))
    with path.open("rb+") as file:
        file.truncate(8 << 30)
    refused("bytes of the header of .* is 4294967296, it must be within", lambda: read_header(path))


def test_pipes_and_devices_are_no_weights(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        refused("not a regular file", lambda name=name: read_header(tmp_path / name))
        refused("not a regular file", lambda name=name: _load(tmp_path / name))


@pytest.mark.parametrize("file", ["x" * 5000, "a\0b", "../x", "\ud800", ""])
def test_an_index_names_files_beside_it(file: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    refused("is missing|outside of the checkpoint|half a character", lambda: shards_of(tmp_path))


def test_an_index_of_many_files_costs_no_square(tmp_path: Path) -> None:
    index = {"weight_map": {f"w{number}": f"f{number}" for number in range(50_000)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("f0 is missing", lambda: shards_of(tmp_path))


def test_ranks_are_counted_by_the_files_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "consolidated.1000000000.pth").touch()
    refused("of rank 0, its last rank is 1000000000", lambda: _numbered(tmp_path, "consolidated.*.pth"))


CONTENTS = {
    "whole numbers as keys": ({1: torch.ones(2)}, "something under 1, names of tensors are texts"),
    "texts and tuples as keys": ({"a": torch.ones(2), (1, 2): torch.ones(2)}, r"something under \(1, 2\)"),
    "sparse": ({"a": torch.ones(2, 2).to_sparse()}, "a is sparse or nested"),
    "compressed sparse": ({"a": torch.ones(2, 2).to_sparse_csr()}, "a is sparse or nested"),
    "meta": ({"a": torch.ones(2, device="meta")}, "a lies on the device 'meta'"),
    "complex": ({"a": torch.ones(2, dtype=torch.complex64)}, "a is stored as complex64"),
    "integers": ({"a": torch.ones(2, dtype=torch.int32)}, "a is stored as int32"),
    "expanded": ({"a": torch.ones(1).expand(1 << 20, 1 << 10)}, "a is larger than what is stored of it"),
    "no dictionary": ([1], "holds a list"),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("case", CONTENTS)
def test_only_dense_named_floats_are_loaded(case: str, tmp_path: Path) -> None:
    content, message = CONTENTS[case]
    torch.save(content, tmp_path / "x.pth")
    refused(message, lambda: _load(tmp_path / "x.pth"))


class _Allocates:
    """An allowed function of torch's that makes a tensor outside of the file, whose pages are not ours to give back."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return torch.Tensor, (4096,)


def test_tensors_outside_of_the_file_are_refused(tmp_path: Path) -> None:
    torch.save({"a": _Allocates()}, tmp_path / "x.pth")
    refused("a does not lie in the file", lambda: _load(tmp_path / "x.pth"))


@pytest.mark.filterwarnings("ignore:.*quantize", "ignore:.*TypedStorage")
def test_quantised_tensors_are_refused_when_opened(tmp_path: Path) -> None:
    torch.save({"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, tmp_path / "x.pth")
    refused("x.pth", lambda: _load(tmp_path / "x.pth"))


def rewritten(path: Path, pickled: Callable[[bytes], bytes]) -> None:
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(name, pickled(content) if name.endswith("data.pkl") else content)


def test_a_damaged_description_is_one_line_wherever_it_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"a": torch.ones(2), "b": torch.zeros(3, dtype=torch.bfloat16)}, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        length = next(entry.file_size for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
    for place in range(0, length, 5):
        path.write_bytes(whole)
        rewritten(path, lambda data, place=place: data[:place] + bytes([data[place] ^ 0x41]) + data[place + 1 :])
        try:
            _load(path)
        except HerdError as error:
            assert "\n" not in str(error)  # noqa: PT017 - some flips change only a name


@pytest.mark.parametrize("content", [b"", b"PK\5\6" + bytes(18), b"\x80\x02.", pickle.dumps({"a": 1}), bytes(100)])
def test_what_is_no_archive_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    refused("is damaged or cut off", lambda: _load(tmp_path / "x.pth"))


def test_a_description_of_any_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive, \
            archive.open("x/data.pkl", "w") as file:
        for _ in range(65):
            file.write(bytes(1 << 20))
    refused("bytes of description, at most 67108864", lambda: _load(path))


@pytest.mark.parametrize(("scale", "shown"), [
    (torch.nan, "nan"), (torch.inf, "inf"), (0.0, "0"), (-1.0, "-1"), (1e-45, "1.4013e-45"),
])
def test_scales_of_weights_are_positive_numbers(scale: float, shown: str, tmp_path: Path) -> None:
    weights = {"w": Stored(torch.ones(2, 3).to(torch.float8_e4m3fn))}
    found = with_scales(tmp_path, weights, {"w": Stored(torch.tensor([[1.0], [scale]]))})["w"]
    refused(f"a scale of w is {shown}, it must be within", found.read)


def test_a_product_that_overflows_is_named(tmp_path: Path) -> None:
    weights = {"w": Stored(torch.full((2, 3), 448.0).to(torch.float8_e4m3fn))}
    sources = with_scales(tmp_path, weights, {"w": Stored(torch.tensor(3e38))})
    refused(r"w holds an infinity at \[0, 0\]", lambda: Checkpoint(tmp_path, TINY, sources, []).read("w"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_named_with_its_place(value: float, tmp_path: Path) -> None:
    weight = torch.ones(4, 3)
    weight[2, 1] = value
    checkpoint = Checkpoint(tmp_path, HerdConfig(text=TINY.text), {"w": Stored(weight)}, [])
    refused(r"w holds an? \w+ at \[2, 1\]: the checkpoint is damaged", lambda: checkpoint.read("w"))
    refused(r"w holds an? \w+ at \[2, 1\]", lambda: checkpoint.read("w", slice(1, 3)))
    refused(r"w \[2\] holds an? \w+ at \[1\]", lambda: checkpoint.read("w", 2))
    assert checkpoint.read("w", slice(0, 2)).sum() == 6


def test_processor_files_are_regular_and_small(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, TINY, {}, [])
    (tmp_path / "tokenizer.json").symlink_to("/dev/zero")
    refused("tokenizer.json is not a regular file", checkpoint.processor_files)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").symlink_to("nowhere")
    refused("tokenizer.json cannot be read: No such file", checkpoint.processor_files)
    (tmp_path / "tokenizer.json").unlink()
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(6 << 30)
    refused("tokenizer.json has 6442450944 bytes, at most", checkpoint.processor_files)


def test_a_gguf_file_is_told_what_to_do_with(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").touch()
    refused(r"x\.gguf is not a directory: make a checkpoint of it with `herdgraph upcycle`",
            lambda: open_checkpoint(tmp_path / "x.gguf"))


def test_written_files_have_the_mode_of_others(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write_tensors({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


