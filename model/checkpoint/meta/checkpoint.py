"""Meta's layout: ``params.json`` and ``consolidated.NN.pth``, one file per tensor-parallel rank.

Files are memory-mapped and unpickled with ``weights_only=True``: no code in them runs. FP8 (``fp8_mixed``) adds
``fp8_scales_{rank}.pt`` with the scales of routed experts; llama-models ``quantization/loader.py`` is the reference.
"""

from __future__ import annotations

import mmap
import pickle
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from ....errors import HerdError
from ....reading import JSON_BYTES, open_file
from ...config import HerdConfig
from ..base import Checkpoint, check_tensors, shortened
from ..names import is_buffer
from ..quantized import FLOAT8, FLOATS
from .decoder import decoder_tensors
from .tensor_parallel_files import TensorParallelFiles
from .vision import vision_tensors


def open_meta(directory: Path, config: HerdConfig) -> Checkpoint:
    """Open a directory with ``consolidated.*.pth``.

    Args:
        directory: with one file per rank, numbered from 00.
        config: of its ``params.json``.

    Raises:
        HerdError: a file is missing or damaged, int4 weights, or the tensors do not fit the configuration.
    """
    weight_files = _numbered(directory, "consolidated.*.pth")
    if not weight_files:
        raise HerdError(f"{directory} has params.json but no consolidated.*.pth: download the weights")
    if any(directory.glob("int4_scales_*.pt")):
        # The reference's script writes other scales than its loader asks for (first and last layer, shared expert).
        raise HerdError(f"{directory} holds int4_mixed weights, which are not supported: use bf16 or fp8_mixed")
    scale_files = _numbered(directory, "fp8_scales_*.pt")
    if scale_files and len(scale_files) != len(weight_files):
        raise HerdError(f"{directory} has {len(weight_files)} weight files and {len(scale_files)} fp8_scales files: "
                        "download the missing one")
    files = TensorParallelFiles(directory, [_load(path) for path in weight_files])
    scales = [_load(path) for path in scale_files]
    try:
        tensors = decoder_tensors(files, config.text, scales)
        if config.vision:
            tensors |= vision_tensors(files, config.vision)
        check_tensors(directory, config, tensors)
    except IndexError as error:
        raise HerdError(f"{directory} holds a tensor of fewer axes than its name has: download the weights "
                        "again") from error
    unknown = files.unknown()
    if unknown:
        raise HerdError(f"{directory} has a tensor {shortened(unknown[0])} that its params.json does not explain: "
                        "remove it or fix params.json")
    return Checkpoint(directory, config, tensors, [*weight_files, *scale_files])


def _numbered(directory: Path, pattern: str) -> list[Path]:
    """Files of all ranks in the ranks' order: 10 comes after 9, whether or not the numbers are padded."""
    number = re.compile(re.escape(pattern).replace(r"\*", r"([0-9]+)"))
    found = {int(match[1]): path for path in directory.glob(pattern) if (match := number.fullmatch(path.name))}
    missing = next((rank for rank in range(len(found)) if rank not in found), None)
    if missing is not None:
        raise HerdError(f"{directory} has no {pattern} of rank {missing}, its last rank is {max(found)}: "
                        "download the missing one")
    return [found[rank] for rank in sorted(found)]


def _load(path: Path) -> dict[str, Tensor]:
    _check_archive(path)
    try:
        content = _map(path)
    except pickle.UnpicklingError as error:
        raise HerdError(f"{path} holds more than tensors and was not loaded: get it from a source you trust") from error
    except Exception as error:  # a damaged pickle is a program that does anything
        raise HerdError(f"{path} is damaged or cut off: download it again") from error
    if not isinstance(content, dict):
        raise HerdError(f"{path} holds a {type(content).__name__}, tensors by name are needed: download it again")
    if (key := next((key for key in content if not isinstance(key, str)), None)) is not None:
        raise HerdError(f"{path} holds something under {shortened(repr(key))}, names of tensors are texts: "
                        "download it again")
    # The reference's quantisation script stores parameters; detached, their copies carry no gradient graph.
    mapped = _mapped(path)
    return {name: _plain(path, name, value, mapped) for name, value in content.items()
            if isinstance(value, Tensor) and not is_buffer(name)}


def _check_archive(path: Path) -> None:
    """Refuse what torch would wait for, or read whole without end: pipes, devices, and a description of any size."""
    with open_file(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                pickles = [entry.file_size for entry in archive.infolist() if entry.filename.endswith("data.pkl")]
        except Exception as error:  # the library raises whatever a damaged directory makes of it
            raise HerdError(f"{path} is damaged or cut off: download it again") from error
    if max(pickles, default=0) > JSON_BYTES:
        raise HerdError(f"{path} has {max(pickles)} bytes of description, at most {JSON_BYTES} are read: "
                        "download it again")


def _mapped(path: Path) -> list[range] | None:
    """Addresses at which a file is mapped; None where the system does not tell."""
    maps, inode = Path("/proc/self/maps"), str(path.stat().st_ino)
    if not maps.exists():
        return None
    lines = [line.split(maxsplit=5) for line in maps.read_text(encoding="utf-8", errors="replace").splitlines()]
    return [range(*(int(address, 16) for address in line[0].split("-"))) for line in lines if line[4] == inode]


def _plain(path: Path, name: str, value: Tensor, mapped: list[range] | None) -> Tensor:
    """A tensor whose numbers lie in the file, one after another; torch stores other kinds, too, and can be told to
    allocate some, whose memory must not be given back as that of the file is (``MappedTensor``).
    """
    problem = ""
    if value.layout is not torch.strided or value.is_nested:
        problem = "is sparse or nested"
    elif value.device.type != "cpu":
        problem = f"lies on the device {value.device.type!r} and has no numbers"
    elif value.dtype not in (*FLOATS, *FLOAT8):  # quantised and complex ones among them
        problem = f"is stored as {str(value.dtype).removeprefix('torch.')}"
    elif value.numel() * value.itemsize > value.untyped_storage().nbytes():
        problem = "is larger than what is stored of it"
    elif mapped is not None and value.numel() and not any(value.data_ptr() in part for part in mapped):
        problem = "does not lie in the file"
    if problem:
        raise HerdError(f"{path}: {shortened(name)} {problem}; dense floats and FP8 are supported: "
                        "use such a checkpoint")
    return value.detach()


def _map(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as error:
        if "unable to mmap" not in str(error):
            raise
    # torch maps privately, and Linux refuses private mappings of more than the machine's memory. A shared one is
    # not limited; nothing here writes to it.
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
