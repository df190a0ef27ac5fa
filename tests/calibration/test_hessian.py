"""Hessians that are added up in a file: what they hold, how little of them is in memory, and disks that are full."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from herdgraph.calibration.hessian import SHARED_HESSIAN_WEIGHT, HessianSums
from herdgraph.calibration.measure import measure
from herdgraph.calibration.windows import Data, Window
from herdgraph.errors import HerdError
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.checkpoint.tensors.write import write_zeros
from herdgraph.model.config.presets import TINY
from support import herds

EXPERTS, DENSE = "layers.1.feed_forward.experts.down_proj", "layers.1.feed_forward.shared_expert.down_proj.weight"
SHAPES = {EXPERTS: (3, 8, 8), DENSE: (6, 6)}


def _rows(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_sums_and_shares(tmp_path: Path) -> None:
    """Calls add up; an expert that saw nothing has its share of the others'."""
    sums = HessianSums(tmp_path / "h", SHAPES)
    first, again, last, dense = _rows(5, 8), _rows(2, 3, 8), _rows(4, 8), _rows(7, 6)
    sums.add(EXPERTS, first, expert=0)
    sums.add(DENSE, dense)
    sums.add(EXPERTS, again, expert=0)
    sums.add(EXPERTS, last, expert=2)
    sums.finish()
    found, both = load_file(tmp_path / "h"), torch.cat([first, again.flatten(0, 1)])
    own = torch.stack([both.T @ both, torch.zeros(8, 8), last.T @ last])
    torch.testing.assert_close(found[EXPERTS], own + SHARED_HESSIAN_WEIGHT * own.sum(0))
    torch.testing.assert_close(found[DENSE], dense.T @ dense)


def test_one_expert_is_in_memory(tmp_path: Path) -> None:
    sums = HessianSums(tmp_path / "h", {EXPERTS: (50, 8, 8)})
    for expert in range(50):
        sums.add(EXPERTS, _rows(3, 8), expert=expert)
        held = [total for _, total in sums._sums.values()] + list(sums._of_all.values())
        assert sum(total.numel() for total in held) <= 2 * 8 * 8


def test_the_file_is_what_the_library_writes(tmp_path: Path) -> None:
    write_zeros(tmp_path / "ours", SHAPES)
    save_file({name: torch.zeros(shape) for name, shape in SHAPES.items()}, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_disk_that_is_full_amid_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, nothing half-written that a later run would take for whole, and the same result in the end."""
    herds.save(TINY, tmp_path / "checkpoint")
    data, work = Data([Window(herds.tokens(40))], []), tmp_path / "work"

    def full(self: HessianSums, name: str, *_: object) -> None:
        if name.startswith("layers.1."):
            raise OSError(28, "No space left on device")
        write(self, name, *_)

    write = HessianSums._write
    with open_checkpoint(tmp_path / "checkpoint") as checkpoint:
        with monkeypatch.context() as patch:
            patch.setattr(HessianSums, "_write", full)
            with pytest.raises(HerdError, match=r"writing \S+ failed: No space left on device; \S+ keeps 1 of 4 parts"):
                measure(checkpoint, data, work, key="")
        assert [path.name for path in (work / "hessians").iterdir()] == ["layers.0.safetensors"]
        measure(checkpoint, data, work, key="")
        measure(checkpoint, data, tmp_path / "whole", key="")
    for path in (tmp_path / "whole" / "hessians").iterdir():
        assert (work / "hessians" / path.name).read_bytes() == path.read_bytes()
