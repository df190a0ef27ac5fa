"""The bundle format: what is refused, and how it says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from herdgraph.errors import HerdError
from herdgraph.model.config.presets import TINY
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.runtimes.bundle.manifest import MANIFEST, Bundle, Manifest, describe_files, write_manifest
from herdgraph.runtimes.bundle.shards import CollectiveOp

GRAPHS = {"decoder": "decoder.onnx", "vision": "vision.onnx"}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    directory = tmp_path / "bundle"
    (directory / "processor").mkdir(parents=True)
    (directory / "decoder.onnx").write_bytes(b"graph")
    (directory / "decoder.data").write_bytes(bytes(range(256)) * 64)
    (directory / "processor" / "tokenizer.json").write_text("{}")
    (directory / "vision.onnx").write_bytes(b"graph")
    write_manifest(directory, Manifest(target="cpu", recipe="fp32", config=TINY, graphs=GRAPHS,
                                       active_bytes=0, files=describe_files(directory)))
    return directory


def _edit(bundle: Path, **changes: object) -> None:
    path = bundle / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _text(bundle: Path, **changes: object) -> None:
    config = TINY.to_json()
    _edit(bundle, config={**config, "text": {**config["text"], **changes}})


def test_round_trip(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    assert opened.manifest.config == TINY
    assert opened.graph("decoder") == bundle / "decoder.onnx"
    assert set(opened.manifest.files) == {"decoder.onnx", "decoder.data", "vision.onnx",
                                          "processor/tokenizer.json"}
    assert opened.bytes == 5 + 5 + 256 * 64 + 2


def _shards(bundle: Path, **changes: object) -> None:
    """Say that the bundle is split over two ranks, with some values of rank 1 replaced."""
    sums = [{"op": "all_reduce", "value": "a", "result": "b"}]
    ranks: list[dict[str, object]] = [
        {"layers": [0, 4], "heads": 2, "kv_heads": 1,
         "pieces": [{"graph": "decoder.onnx", "before": [], "after": sums}]} for _ in range(2)
    ]
    plan = changes.pop("plan", {"tensor": 2, "expert": 1, "pipeline": 1})
    ranks[1] |= changes
    _edit(bundle, shards={"plan": plan, "ranks": ranks})


def test_shards_round_trip(bundle: Path) -> None:
    _shards(bundle)
    shards = Bundle.open(bundle).manifest.shards
    assert shards is not None
    assert shards.plan == ShardPlan(2)
    assert shards.ranks[1].pieces[0].after == (CollectiveOp("all_reduce", "a", "b"),)
    assert shards.to_json() == json.loads((bundle / MANIFEST).read_text())["shards"]


def _flip(bundle: Path) -> None:
    data = bytearray((bundle / "decoder.data").read_bytes())
    data[5000] ^= 1
    (bundle / "decoder.data").write_bytes(bytes(data))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "one byte altered": (_flip, r"decoder.data was altered: SHA-256 .* copy or rebuild"),
    "file cut": (lambda b: (b / "decoder.data").write_bytes(b"x"), r"has 1 bytes, the manifest says 16384"),
    "file missing": (lambda b: (b / "decoder.data").unlink(), r"decoder.data is missing"),
    "newer format": (lambda b: _edit(b, format=99), r"json: the bundle format is 99, .* reads format 1: update"),
    "older format": (lambda b: _edit(b, format=0), r"format is 0, .*: rebuild"),
    "no format": (lambda b: _edit(b, format=None), r"format is None"),
    "format true": (lambda b: _edit(b, format=True), r"format is True"),
    "a list": (lambda b: (b / MANIFEST).write_text("[]"), r"holds a list, a JSON object is needed"),
    "null": (lambda b: (b / MANIFEST).write_text("null"), r"holds a NoneType, a JSON object is needed"),
    "nested": (lambda b: (b / MANIFEST).write_text("[" * 200_000), r"cannot be read as JSON"),
    "files a list": (lambda b: _edit(b, files=[]), r"the manifest has \[\] as 'files', an object is needed: rebuild"),
    "file a number": (lambda b: _edit(b, files={"a": 5}), r"file 'a' is 5, an object is needed"),
    "hash a number": (lambda b: _edit(b, files={"a": {"bytes": 1, "sha256": 5}}), r"has 5 as 'sha256', a text is need"),
    "graphs a list": (lambda b: _edit(b, graphs=[]), r"has \[\] as 'graphs', an object"),
    "no graphs": (lambda b: _edit(b, graphs={}), r"graphs names no decoder"),
    "no image graph": (lambda b: _edit(b, graphs={"decoder": "decoder.onnx"}), r"graphs names no vision"),
    "graph a number": (lambda b: _edit(b, graphs={"decoder": 5}), r"graphs has 5 as 'decoder', a text is needed"),
    "source a number": (lambda b: _edit(b, source=5), r"has 5 as 'source', an object"),
    "unknown value": (lambda b: _edit(b, colour="red"), r"has an unknown value 'colour'"),
    "config a text": (lambda b: _edit(b, config={**TINY.to_json(), "text": "x"}), r"TextConfig is 'x', a JSON object"),
    "config misses": (lambda b: _edit(b, config={}), r"HerdConfig has no field 'begin_image_token_id'"),
    "context a text": (lambda b: _text(b, max_position_embeddings="9"), r"max_position_embeddings is '9', a whole num"),
    "endless split": (lambda b: _text(b, attention_chunk_size=-1), r"attention_chunk_size is -1"),
    "layers a number": (lambda b: _text(b, moe_layers=3), r"moe_layers is 3, a list of whole numbers is needed"),
    "path outside": (lambda b: _edit(b, graphs=GRAPHS | {"decoder": "../../etc/passwd"}), r"outside of the bundle"),
    "absolute path": (lambda b: _edit(b, files={"/etc/passwd": {"bytes": 1, "sha256": ""}}), r"outside of the bundle"),
    "unknown file": (lambda b: (b / "processor" / "chat_template.jinja").write_text("x"), r"jinja is not in the mani"),
    "unhashed graph": (lambda b: _edit(b, graphs=GRAPHS | {"decoder": "other.onnx"}), r"no hash for graph 'other"),
    "not JSON": (lambda b: (b / MANIFEST).write_text("{"), r"cannot be read"),
    "missing key": (lambda b: (b / MANIFEST).write_text('{"format": 1}'), r"manifest has no value 'active_bytes'"),
    "no manifest": (lambda b: (b / MANIFEST).unlink(), r"not a herdgraph bundle; build one with build.py"),
    "checkpoint": (lambda b: (b / MANIFEST).rename(b / "config.json"), r"is a checkpoint: not a herdgraph bundle"),
    "shards a list": (lambda b: _edit(b, shards=[]), r"manifest has \[\] as 'shards', an object is needed"),
    "shards empty": (lambda b: _edit(b, shards={"plan": {}}), r"shards has no value 'ranks'"),
    "no tensor": (lambda b: _shards(b, plan={"expert": 2, "pipeline": 1}), r"the plan has no value 'tensor'"),
    "a negative plan": (lambda b: _shards(b, plan={"tensor": -2, "expert": 1, "pipeline": 1}), r"tp is -2"),
    "a rank too few": (lambda b: _shards(b, plan={"tensor": 4, "expert": 1, "pipeline": 1}), r"has 2 ranks, the .* 4"),
    "other heads": (lambda b: _shards(b, heads=3), r"rank 1 has layers, heads .* \(\(0, 4\), 3, 1\), the plan tp=2,"),
    "other layers": (lambda b: _shards(b, layers=["x"]), r"rank 1 has layers, .* \(\('x',\), 2, 1\)"),
    "no pieces": (lambda b: _shards(b, pieces=[]), r"rank 1 has no pieces"),
    "a piece a number": (lambda b: _shards(b, pieces=[1]), r"a piece of a shard is 1, an object is needed"),
    "a piece outside": (lambda b: _shards(b, pieces=[{"graph": "../x.onnx", "before": [], "after": []}]), r"outside"),
    "an unhashed piece": (lambda b: _shards(b, pieces=[{"graph": "x.onnx", "before": [], "after": []}]), r"no hash"),
    "another exchange": (lambda b: _shards(b, pieces=[{"graph": "decoder.onnx", "before": [{"op": "steal"}],
                                                       "after": []}]), r"exchange of a shard is 'steal', it must be"),
    "half an exchange": (lambda b: _shards(b, pieces=[{"graph": "decoder.onnx", "before": [{"op": "recv"}],
                                                       "after": []}]), r"exchange 'recv' has no value 'value'"),
    "nothing": (lambda b: b.rename(b.with_name("moved")), r"bundle does not exist: give the directory of a bundle"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault: str, bundle: Path) -> None:
    damage, message = FAULTS[fault]
    damage(bundle)
    with pytest.raises(HerdError, match=message) as caught:
        Bundle.open(bundle)
    assert "\n" not in str(caught.value)


def test_size_is_checked_even_without_hashes(bundle: Path) -> None:
    _flip(bundle)
    Bundle.open(bundle, verify=False)
    (bundle / "decoder.data").write_bytes(b"x")
    with pytest.raises(HerdError, match="has 1 bytes"):
        Bundle.open(bundle, verify=False)
