"""The CLIP vision transformer, up to the layers whose outputs the projector reads (paper §3.1).

Parameter names are Hugging Face's (including `pre_layrnorm`, sic), so that a checkpoint loads as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from .activations import ACTIVATIONS
from .attention_kernels import no_plans
from .loading.config import Config, VisionConfig


class Embeddings(nn.Module):
    """Tiles [N, 3, S, S] → [N, 1 + grid², C]: a class token, then one token per patch in raster order."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(1 + config.grid**2, width)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # [N, grid², C]
        cls = self.class_embedding.expand(patches.shape[0], 1, -1)  # len() would export one number of tiles
        return torch.cat([cls, patches], dim=1) + self.position_embedding.weight


class Attention(nn.Module):
    """Multi-head self-attention without a mask, all projections with bias."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        """[N, tokens, C] → [N, H, tokens, D]."""
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split_heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))


class VisionTower(nn.Module):
    """Tiles → hidden states → patch features of the configured layers (LLaVA: the last but one), joined along channels."""

    def __init__(self, config: Config):
        super().__init__()
        vision = config.vision
        self.feature_layers, self.keep_cls = config.feature_layers, config.keep_cls
        self.embeddings = Embeddings(vision)
        self.pre_layrnorm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        self.encoder = Encoder(vision)
        # Part of every CLIP checkpoint, and never applied to the features that LLaVA takes.
        self.post_layernorm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)

    @no_plans()
    def forward(self, pixel_values: torch.Tensor, also: Iterable[int] = ()) -> dict[int, torch.Tensor]:
        """pixel_values [N, 3, S, S] → the inputs [N, 1 + grid², C] of blocks, by the block's number from 0.

        They are those of the feature layers and of the blocks `also`. Blocks from the highest feature layer on are not run.
        """
        wanted, last = {*self.feature_layers, *also}, max(self.feature_layers)
        x = self.pre_layrnorm(self.embeddings(pixel_values))
        states = {0: x}
        for index in range(last):
            x = self.encoder.layers[index](x)
            if index + 1 in wanted:
                states[index + 1] = x
        return states

    def features(self, states: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Of what `forward` gives, what the projector reads: [N, grid² (+ 1 with `keep_cls`), C × feature layers]."""
        features = torch.cat([states[layer] for layer in self.feature_layers], dim=-1)
        return features if self.keep_cls else features[:, 1:]
