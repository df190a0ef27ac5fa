"""The bundle format: what is refused, and how it says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from herdgraph.errors import HerdError
from herdgraph.model.config.presets import TINY
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.runtimes.bundle.blocks import write_block_hashes
from herdgraph.runtimes.bundle.manifest import MANIFEST, Bundle, Manifest, describe_files, write_manifest
from herdgraph.runtimes.bundle.shards import CollectiveOp

GRAPHS = {"decoder": "decoder.onnx", "vision": "vision.onnx"}
PLAN = {"tensor": 2, "expert": 1, "pipeline": 1}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    directory = tmp_path / "bundle"
    (directory / "processor").mkdir(parents=True)
    (directory / "decoder.onnx").write_bytes(b"graph")
    (directory / "decoder.data").write_bytes(bytes(range(256)) * 64)
    (directory / "processor" / "tokenizer.json").write_text("{}")
    (directory / "vision.onnx").write_bytes(b"graph")
    write_manifest(directory, Manifest(target="cpu", executor="onnxruntime",
                                       provider="CPUExecutionProvider", recipe="fp32", config=TINY, graphs=GRAPHS,
                                       active_bytes=0, files=describe_files(directory)))
    return directory


def _edit(bundle: Path, **changes: object) -> None:
    path = bundle / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _remove(bundle: Path, name: str) -> None:
    path = bundle / MANIFEST
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))


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


def test_blocks_of_format_2_have_sha256(bundle: Path) -> None:
    assert Bundle.open(bundle).manifest.block_digest == "blake3"
    _remove(bundle, "block_digest")
    _edit(bundle, format=2)
    manifest = Bundle.open(bundle).manifest
    assert (manifest.format, manifest.block_digest) == (2, "sha256")


def test_block_hashes_that_nobody_vouches_for_are_refused(bundle: Path) -> None:
    write_block_hashes(bundle / "decoder.data")
    with pytest.raises(HerdError, match=r"decoder.data.blake3 is not in the manifest, so nobody vouches for it"):
        Bundle.open(bundle).block_hashes(bundle / "decoder.data")


def _shards(bundle: Path, **changes: object) -> None:
    """Say that the bundle is split over two ranks, with some values of rank 1 replaced."""
    sums = [{"op": "all_reduce", "value": "a", "result": "b"}]
    ranks: list[dict[str, object]] = [
        {"layers": [0, 4], "heads": 2, "kv_heads": 1,
         "partitions": [{"graph": "decoder.onnx", "before": [], "after": sums}]} for _ in range(2)
    ]
    plan = changes.pop("plan", PLAN)
    ranks[1] |= changes
    _edit(bundle, shards={"plan": plan, "ranks": ranks})


def _partition(bundle: Path, **changes: object) -> None:
    """Say that the bundle is split over two ranks, and rank 1 runs one partition with these values."""
    _shards(bundle, partitions=[{"graph": "decoder.onnx", "before": [], "after": [], **changes}])


def test_shards_round_trip(bundle: Path) -> None:
    _shards(bundle)
    shards = Bundle.open(bundle).manifest.shards
    assert shards is not None
    assert shards.plan == ShardPlan(2)
    assert shards.ranks[1].partitions[0].after == (CollectiveOp("all_reduce", "a", "b"),)
    written = (bundle / MANIFEST).read_text()
    write_manifest(bundle, Bundle.open(bundle).manifest)
    assert json.loads((bundle / MANIFEST).read_text()) == json.loads(written)


def _flip(bundle: Path) -> None:
    data = bytearray((bundle / "decoder.data").read_bytes())
    data[5000] ^= 1
    (bundle / "decoder.data").write_bytes(bytes(data))


def _link_out(bundle: Path, name: str) -> None:
    """Move a file or directory out of the bundle and leave a link to it: the hashes still fit."""
    outside = bundle.parent / "outside"
    (bundle / name).rename(outside)
    (bundle / name).symlink_to(outside)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "one byte altered": (_flip, r"decoder.data was altered: SHA-256 .* copy or rebuild"),
    "link out": (lambda b: _link_out(b, "decoder.data"), r"decoder.data leads out of the bundle, to .*/outside: copy"),
    "processor out": (lambda b: _link_out(b, "processor"), r"processor leads out of the bundle"),
    "manifest out": (lambda b: _link_out(b, MANIFEST), r"manifest.json leads out of the bundle"),
    "unknown digest": (lambda b: _edit(b, block_digest="md5"), r"block_digest: invalid enum value 'md5': rebuild"),
    "key twice": (lambda b: (b / MANIFEST).write_text('{"format": 3, "format": 3}'), r"'format' is given twice"),
    "file cut": (lambda b: (b / "decoder.data").write_bytes(b"x"), r"has 1 bytes, the manifest says 16384"),
    "file missing": (lambda b: (b / "decoder.data").unlink(), r"decoder.data is missing"),
    "newer format": (lambda b: _edit(b, format=99), r"json: the bundle format is 99, .* reads format 3: update"),
    "older format": (lambda b: _edit(b, format=1), r"format is 1, .*: build it again"),
    "no format": (lambda b: _edit(b, format=None), r"format is None"),
    "format true": (lambda b: _edit(b, format=True), r"format is True"),
    "a list": (lambda b: (b / MANIFEST).write_text("[]"), r"holds a list, a JSON object is needed"),
    "null": (lambda b: (b / MANIFEST).write_text("null"), r"holds a NoneType, a JSON object is needed"),
    "nested": (lambda b: (b / MANIFEST).write_text("[" * 200_000), r"cannot be read as JSON"),
    "files a list": (lambda b: _edit(b, files=[]), r"json: files: expected object, got array: rebuild"),
    "file a number": (lambda b: _edit(b, files={"a": 5}), r"files\['a'\]: expected object, got int: rebuild"),
    "hash a number": (
        lambda b: _edit(b, files={"a": {"bytes": 1, "sha256": 5}}),
        r"files\['a'\].sha256: expected str, got int"),
    "graphs a list": (lambda b: _edit(b, graphs=[]), r"json: graphs: expected object, got array"),
    "no graphs": (lambda b: _edit(b, graphs={}), r"graphs names no decoder"),
    "no image graph": (lambda b: _edit(b, graphs={"decoder": "decoder.onnx"}), r"graphs names no vision"),
    "graph a number": (lambda b: _edit(b, graphs={"decoder": 5}), r"graphs\['decoder'\]: expected str, got int"),
    "source a number": (lambda b: _edit(b, source=5), r"json: source: expected object, got int"),
    "unknown value": (lambda b: _edit(b, colour="red"), r"object contains unknown field colour: rebuild"),
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
    "missing key": (lambda b: (b / MANIFEST).write_text('{"format": 3}'),
                    r"json: the manifest: object missing required field config: rebuild"),
    "no manifest": (lambda b: (b / MANIFEST).unlink(), r"not a herdgraph bundle; build one with `herdgraph build`"),
    "checkpoint": (lambda b: (b / MANIFEST).rename(b / "config.json"), r"is a checkpoint: not a herdgraph bundle"),
    "shards a list": (lambda b: _edit(b, shards=[]), r"json: shards: expected object, got array"),
    "shards empty": (lambda b: _edit(b, shards={"plan": PLAN}), r"shards: object missing required field ranks"),
    "no tensor": (
        lambda b: _shards(b, plan={"expert": 2, "pipeline": 1}),
        r"shards.plan: object missing required field tensor"),
    "a negative plan": (lambda b: _shards(b, plan={"tensor": -2, "expert": 1, "pipeline": 1}), r"tp is -2"),
    "a rank too few": (lambda b: _shards(b, plan={"tensor": 4, "expert": 1, "pipeline": 1}), r"has 2 ranks, the .* 4"),
    "other heads": (lambda b: _shards(b, heads=3), r"rank 1 has layers, heads .* \(\(0, 4\), 3, 1\), the plan tp=2,"),
    "other layers": (
        lambda b: _shards(b, layers=["x"]),
        r"shards.ranks\[1\].layers: expected array of length 2, got 1"),
    "no partitions": (lambda b: _shards(b, partitions=[]), r"rank 1 has no partitions"),
    "a partition a number": (
        lambda b: _shards(b, partitions=[1]),
        r"shards.ranks\[1\].partitions\[0\]: expected object, got int"),
    "a partition outside": (lambda b: _partition(b, graph="../x.onnx"), r"outside"),
    "an unhashed partition": (lambda b: _partition(b, graph="x.onnx"), r"no hash"),
    "another exchange": (lambda b: _partition(b, before=[{"op": "steal", "value": "a"}]),
                         r"shards.ranks\[1\].partitions\[0\].before\[0\]: op is 'steal', it must be one of all_"),
    "half an exchange": (
        lambda b: _partition(b, before=[{"op": "recv"}]),
        r"object missing required field value: rebu"),
    "a sum without a result": (lambda b: _partition(b, after=[{"op": "all_reduce", "value": "a"}]),
                               r"after\[0\]: all_reduce needs a value result: rebuild"),
    "a gather without an axis": (lambda b: _partition(b, after=[{"op": "all_gather", "value": "a", "result": "b"}]),
                                 r"after\[0\]: all_gather needs a value axis"),
    "a receipt with an axis": (lambda b: _partition(b, before=[{"op": "recv", "value": "a", "axis": 1}]),
                               r"before\[0\]: recv takes no axis"),
    "an unknown value of the plan": (lambda b: _shards(b, plan=PLAN | {"depth": 1}), r"shards.plan: .* field depth"),
    "a plan value a text": (lambda b: _shards(b, plan=PLAN | {"tensor": "2"}), r"plan.tensor: expected int, got str"),
    "no executor": (lambda b: _remove(b, "executor"), r"the manifest: object missing required field executor"),
    "active bytes a text": (lambda b: _edit(b, active_bytes="5"), r"manifest.active_bytes: expected int, got str"),
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
