"""A sequence owns its state: others read it, and change it by its methods."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

import herdgraph.runtimes
from herdgraph.model.config.presets import TINY
from herdgraph.runtimes import Sequence
from herdgraph.runtimes.kv_cache.buffers import KVBuffers

RUNTIMES = Path(herdgraph.runtimes.__file__).parent
OWNER = RUNTIMES / "kv_cache" / "sequence.py"
STATE = ("token_ids", "features", "tile_digests", "cache", "written", "binding")


def _sequence() -> Sequence:
    return Sequence(KVBuffers(TINY.text), TINY.text.hidden_size)


def _private(path: Path) -> list[str]:
    """Lines of a file that reach for a private attribute of a sequence, and not for one of ``self``."""
    names = {f"_{name}" for name in STATE}
    return [
        f"{path.name}:{node.lineno}" for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value) != "self"
    ]


def _written(path: Path) -> list[str]:
    """Lines of a file that assign, delete or change in place what a sequence shows."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in (
            "append", "extend", "insert", "pop", "remove", "clear", "reverse", "sort"
        ):
            targets = [node.func.value]
        for target in [part for whole in targets for part in (whole.elts if isinstance(whole, ast.Tuple) else [whole])]:
            owner = target.value if isinstance(target, ast.Subscript) else target
            if (isinstance(owner, ast.Attribute) and owner.attr in (*STATE, "layers")
                    and ast.unparse(owner.value) not in ("self", "self.result", "result")):
                found.append(f"{path.name}:{node.lineno}")
    return found


def test_nobody_else_writes_a_sequence() -> None:
    """No module of the runtime reaches into a sequence or changes what its properties give."""
    others = [path for path in RUNTIMES.rglob("*.py") if path != OWNER]
    assert len(others) > 30
    assert [line for path in others for line in _private(path) + _written(path)] == []


@pytest.mark.parametrize("line", [
    "sequence.token_ids.append(1)", "sequence.token_ids += [1]", "del sequence.token_ids[3:]",
    "sequence.binding = None",
    "a.features, b = 1, 2", "sequence.cache.layers[0] = rows", "sequence._token_ids.append(1)", "x._binding = None",
])
def test_the_check_finds_writers(line: str, tmp_path: Path) -> None:
    """The check above can fail: each way of writing is found."""
    path = tmp_path / "writer.py"
    path.write_text(line)
    assert _private(path) + _written(path)


@pytest.mark.parametrize("name", [name for name in STATE if name != "binding"])
def test_properties_are_read_only(name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(_sequence(), name, None)


def test_append_truncate_and_fork() -> None:
    """Tokens, features and tiles grow and shrink together; a fork is independent."""
    sequence = _sequence()
    sequence.append([1, 2, 3])
    sequence.append_images(np.ones((4, TINY.text.hidden_size), np.float32), np.zeros((1, 3, 2, 2), np.float32))
    twin = sequence.fork()
    sequence.truncate(1)
    sequence.truncate_images(2, 0)
    assert (list(sequence.token_ids), len(sequence.features), len(sequence.tile_digests)) == ([1], 2, 0)
    twin.append([4])
    assert (list(twin.token_ids), len(twin.features), len(twin.tile_digests)) == ([1, 2, 3, 4], 4, 1)


def test_a_binding_is_made_again_when_buffers_move() -> None:
    """What an executor has bound to buffers is kept as long as they stay, and no longer."""
    sequence = _sequence()
    first = sequence.binding(object)
    sequence.make_room(2)
    assert sequence.binding(object) is first, "there was room"
    sequence.make_room(1000)
    second = sequence.binding(object)
    assert second is not first, "buffers grew"
    key, value = sequence.cache.layers[0]
    sequence.cache.move_layer(0, (key.copy(), value.copy()))
    sequence.cache_moved()
    assert sequence.binding(object) is not second, "a layer moved"
    assert sequence.fork().binding(object) is not sequence.binding(object)
