"""A DINOv2-S/14 backbone out of an ONNX file, as the weights of a CLIP vision tower that computes the same.

DINOv2 differs from CLIP in four places, and each goes into weights that CLIP has:

- Its patches have a bias, which is added to the positions.
- The output of every attention and MLP is scaled by channel (LayerScale), which is multiplied into their last projections.
- It has no LayerNorm before the blocks. CLIP's does nothing but take the mean of the channels out, if all that comes into it is
  scaled by SCALE: the variance is then far below the LayerNorm's epsilon, and a weight of sqrt(epsilon) / SCALE scales it back.
  Nothing later depends on the mean, as every block begins with a LayerNorm.
- Its activation is GELU, which config.json can name.

Values of 1e-8, which SCALE makes, are none of float16. In bfloat16 and float32 they lose nothing.
"""

from __future__ import annotations

from typing import Any

import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper

SCALE = 1e-6
_EPS = 1e-6  # of every LayerNorm
_HEADS, _PATCH = 6, 14  # of DINOv2-S/14

Weights = dict[str, torch.Tensor]


def read_backbone(content: bytes) -> Weights:
    """The weights of the backbone in an ONNX file, float32, by the names that they had in transformers' Dinov2Model.

    The exporter has kept the names of all but the matrices, which are found by the node that multiplies with them, and the
    positions, which are the constants of the two nodes in `_POSITIONS`.
    """
    graph = onnx.load_model_from_string(content).graph
    stored = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    found = {name.removeprefix("backbone."): v for name, v in stored.items() if name.startswith("backbone.")}
    for node in graph.node:
        inputs = [name for name in node.input if name in stored and not name.startswith("backbone.")]
        if not inputs or not node.name.startswith("/backbone/"):
            continue
        place = node.name.removeprefix("/backbone/")
        if node.op_type == "MatMul":
            found[place.removesuffix("/MatMul").replace("/", ".") + ".weight"] = stored[inputs[0]].T.contiguous()
        elif place in _POSITIONS:
            found[_POSITIONS[place]] = stored[inputs[0]].flatten(0, 1)
    return found


_POSITIONS = {"embeddings/Concat_6": "embeddings.position.class", "embeddings/Reshape_1": "embeddings.position.patches"}


def vision_config(backbone: Weights, image_size: int) -> dict[str, Any]:
    """vision_config of config.json, for square tiles of `image_size` pixels."""
    blocks = [name for name in backbone if name.endswith("norm1.weight")]
    return {
        "model_type": "clip_vision_model",
        "hidden_size": len(backbone["layernorm.weight"]),
        "intermediate_size": len(backbone["encoder.layer.0.mlp.fc1.bias"]),
        "num_hidden_layers": len(blocks),
        "num_attention_heads": _HEADS,
        "num_channels": 3,
        "image_size": image_size,
        "patch_size": _PATCH,
        "hidden_act": "gelu",
        "layer_norm_eps": _EPS,
    }


def clip_weights(backbone: Weights, image_size: int) -> Weights:
    """The same network by the names of CLIP's vision tower."""
    patches = backbone["embeddings.patch_embeddings.projection.weight"]
    positions = _positions(backbone, image_size // _PATCH)
    positions[1:] += backbone["embeddings.patch_embeddings.projection.bias"]
    width = positions.shape[1]
    found = {
        "embeddings.class_embedding": SCALE * backbone["embeddings.cls_token"].flatten(),
        "embeddings.patch_embedding.weight": SCALE * patches,
        "embeddings.position_embedding.weight": SCALE * positions,
        "pre_layrnorm.weight": torch.full((width,), _EPS**0.5 / SCALE),
        "pre_layrnorm.bias": torch.zeros(width),
        "post_layernorm.weight": backbone["layernorm.weight"],
        "post_layernorm.bias": backbone["layernorm.bias"],
    }
    for name, value in backbone.items():
        if not name.startswith("encoder.layer."):
            continue
        block, _, part = name.removeprefix("encoder.layer.").partition(".")
        module, _, kind = part.rpartition(".")
        if module not in _BLOCK:  # LayerScale
            continue
        if module in _SCALED:
            scale = backbone[f"encoder.layer.{block}.{_SCALED[module]}.lambda1"]
            value = value * (scale[:, None] if kind == "weight" else scale)
        found[f"encoder.layers.{block}.{_BLOCK[module]}.{kind}"] = value
    return found


# Names within a block, Dinov2Model's → CLIP's; and which LayerScale follows a projection.
_BLOCK = {
    "norm1": "layer_norm1",
    "attention.attention.query": "self_attn.q_proj",
    "attention.attention.key": "self_attn.k_proj",
    "attention.attention.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_SCALED = {"attention.output.dense": "layer_scale1", "mlp.fc2": "layer_scale2"}


def _positions(backbone: Weights, grid: int) -> torch.Tensor:
    """[1 + grid², C]: the class token's, and the patches' resized from the grid that the backbone was trained on."""
    patches = backbone["embeddings.position.patches"]
    side = round(len(patches) ** 0.5)
    square = patches.T.unflatten(1, (side, side))[None]
    resized = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([backbone["embeddings.position.class"], resized[0].flatten(1).T])
