"""A whole Llama 4 model in torch: image tower and decoder, with weights from a checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checkpoint.reader import TensorReader
from ..config import HerdConfig
from .decoder import Decoder, HeadNorm
from .rope import DecoderRotary, ImageRotary
from .vision import VisionTower


class Llama4(nn.Module):
    """Decoder plus, for multimodal configurations, the image tower."""

    def __init__(self, config: HerdConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = Decoder(config)
        self.vision = VisionTower(config) if config.vision else None

    @classmethod
    def from_checkpoint(cls, checkpoint: TensorReader, dtype: torch.dtype = torch.float32) -> Llama4:
        """The model with a checkpoint's weights, in ``dtype`` on the CPU. The whole model is held in memory."""
        with torch.device("meta"):
            model = cls(checkpoint.config)
        for part in filter(None, (model.decoder, model.vision)):
            load_weights(part, checkpoint, dtype)
        return model

    def forward(
        self, input_ids_BT: Tensor, pixels_NCHW: Tensor | None = None, document_BT: Tensor | None = None
    ) -> Tensor:
        """Logits [B, T, V] of whole sequences; tiles fill the image-token positions in order.

        ``document_BT`` names the documents of packed rows, see ``Decoder.forward``.
        """
        features = self.vision(pixels_NCHW) if self.vision is not None and pixels_NCHW is not None else None
        logits, _ = self.decoder(input_ids_BT, features, document_BT=document_BT)
        return logits


def load_weights(module: nn.Module, source: TensorReader, dtype: torch.dtype) -> None:
    """Give a module built on the meta device its weights, and its constants their values."""
    weights = {name: source.read(name).to(dtype) for name, _ in module.named_parameters()}
    module.load_state_dict(weights, assign=True, strict=True)
    for name, value in constants(source.config, module).items():
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, value)


def constants(config: HerdConfig, module: nn.Module) -> dict[str, Tensor]:
    """Values of a module's buffers, which no checkpoint stores: rotary tables and the ones of ``HeadNorm``.

    The module may live on the meta device or under ``FakeTensorMode``; the owners are rebuilt here for real. Call it
    outside of such a mode.
    """
    found: dict[str, Tensor] = {}
    for path, part in module.named_modules():
        real: nn.Module
        if isinstance(part, DecoderRotary):
            real = DecoderRotary(config.text)
        elif isinstance(part, ImageRotary) and config.vision:
            real = ImageRotary(config.vision)
        elif isinstance(part, HeadNorm):
            real = HeadNorm(config.text.head_dim, config.text.rms_norm_eps)
        else:
            continue
        found |= {f"{path}.{name}": buffer for name, buffer in real.named_buffers()}
    return found
