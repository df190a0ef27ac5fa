"""The Llama 4 image tower: tiles of pixels to decoder-width features.

Shapes: N tiles, P patches per tile (+1 with the class token, which comes last), C tower width, D decoder width.
Parameter names are Hugging Face's (``vision_model.*``, ``multi_modal_projector.*``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config import HerdConfig, VisionConfig
from .operators import rotary_embedding
from .rope import ImageRotary


class PatchEmbedding(nn.Module):
    """Cut a tile into patches (channel, row, column order inside a patch) and project each."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch = config.patch_size
        self.linear = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size, bias=False)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, P, C], patches row-major."""
        side = pixels_NCHW.shape[-1] // self.patch
        grid = pixels_NCHW.unflatten(-1, (side, self.patch)).unflatten(-3, (side, self.patch))
        return self.linear(grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))


class VisionAttention(nn.Module):
    """Bidirectional attention with 2-D rotary positions and biases."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        width = config.hidden_size
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x_NPC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """All patches of a tile attend to each other."""
        q = rotary_embedding(self.q_proj(x_NPC), cos, sin, num_heads=self.num_heads)
        k = rotary_embedding(self.k_proj(x_NPC), cos, sin, num_heads=self.num_heads)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, self.v_proj(x_NPC)))
        attended = functional.scaled_dot_product_attention(q, k, v)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """Two layers with exact GELU between them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape ending in the tower width."""
        return self.fc2(functional.gelu(self.fc1(x)))


class VisionLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = VisionAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x_NPC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention and feed-forward with residuals."""
        x_NPC = x_NPC + self.self_attn(self.input_layernorm(x_NPC), cos, sin)
        return x_NPC + self.mlp(self.post_attention_layernorm(x_NPC))


class VisionEncoder(nn.Module):
    """The stack of layers (its own module because checkpoints name it ``model``)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))

    def forward(self, x_NPC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Run all layers."""
        for layer in self.layers:
            x_NPC = layer(x_NPC, cos, sin)
        return x_NPC


def pixel_shuffle(x_NPC: Tensor, side: int, ratio: float) -> Tensor:
    """Trade resolution for width: [N, side², C] to [N, (side · ratio)², C / ratio²].

    The two transpositions decide the order of the merged elements; it is the reference's (llama-models
    ``vision/embedding.py``), and weights only fit this one.
    """
    tiles, width = x_NPC.shape[0], x_NPC.shape[-1]
    small, wide = int(side * ratio), int(width / ratio)
    x = x_NPC.view(tiles, side, small, wide).transpose(1, 2).contiguous()
    x = x.view(tiles, small, small, int(wide / ratio)).transpose(1, 2).contiguous()
    return x.view(tiles, small * small, int(wide / ratio))


class AdapterMLP(nn.Module):
    """Two layers without bias, GELU after *each*: the second one is easily missed (llama-models ``SimpleMLP``)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        shuffled = int(config.hidden_size / config.pixel_shuffle_ratio**2)
        self.fc1 = nn.Linear(shuffled, config.adapter_hidden_size, bias=False)
        self.fc2 = nn.Linear(config.adapter_hidden_size, config.adapter_output_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shuffled patches to adapter width."""
        return functional.gelu(self.fc2(functional.gelu(self.fc1(x))))


class VisionAdapter(nn.Module):
    """Pixel shuffle, then the MLP."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.side, self.ratio = config.patches_per_side, config.pixel_shuffle_ratio
        self.mlp = AdapterMLP(config)

    def forward(self, x_NPC: Tensor) -> Tensor:
        """[N, P, C] to [N, tokens per tile, adapter width]."""
        return self.mlp(pixel_shuffle(x_NPC, self.side, self.ratio))


class VisionModel(nn.Module):
    """Patches, class token, positions, layers, adapter."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, patches = config.hidden_size, config.patches_per_side**2 + 1
        self.patch_embedding = PatchEmbedding(config)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding_vlm = nn.Parameter(torch.randn(patches, width) * width**-0.5)
        self.rotary = ImageRotary(config)
        self.layernorm_pre = nn.LayerNorm(width, eps=config.norm_eps)
        self.model = VisionEncoder(config)
        self.layernorm_post = nn.LayerNorm(width, eps=config.norm_eps)
        self.vision_adapter = VisionAdapter(config)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] normalised pixels to [N, tokens per tile, adapter width]."""
        x_NPC = self.embed(pixels_NCHW)
        return self.adapt(self.model(x_NPC, *self.rotary(x_NPC.shape[0])))

    def embed(self, pixels_NCHW: Tensor) -> Tensor:
        """What the first layer reads: patches with the class token last, [N, P + 1, C]."""
        # Last, unlike CLIP's, in this and in everything that is per patch: positions, rotations, the cut in ``adapt``.
        patches = self.patch_embedding(pixels_NCHW)
        class_token = self.class_embedding.expand(patches.shape[0], 1, -1)
        return self.layernorm_pre(torch.cat((patches, class_token), dim=1) + self.positional_embedding_vlm)

    def adapt(self, x_NPC: Tensor) -> Tensor:
        """What the last layer gave, without the class token, to adapter width."""
        return self.vision_adapter(self.layernorm_post(x_NPC)[:, :-1])


class Projector(nn.Module):
    """One linear layer from adapter width to decoder width."""

    def __init__(self, config: HerdConfig, vision: VisionConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision.adapter_output_size, config.text.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape ending in the adapter width."""
        return self.linear_1(x)


class VisionTower(nn.Module):
    """Tiles to the features that fill the decoder's image-token positions."""

    def __init__(self, config: HerdConfig) -> None:
        super().__init__()
        assert config.vision is not None, "a text-only configuration has no image tower"
        self.vision_model = VisionModel(config.vision)
        self.multi_modal_projector = Projector(config, config.vision)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] to [N · tokens per tile, D], tiles in order."""
        features: Tensor = self.multi_modal_projector(self.vision_model(pixels_NCHW))
        return features.flatten(0, 1)
