"""LoRA (Hu et al., 2021): the decoder's matrices stay as they are, and each learns a sum of low rank beside it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..arguments import number, settle, shown, whole
from ..errors import InputError
from ..files.reading import open_safetensors
from ..load import Llava
from ..loading.weights import read_headers
from ..model import LlavaNetwork
from .settings import MOST

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoRA:
    """
    rank     r, of each sum
    alpha    the sum is taken times alpha / r
    dropout  of what the sums read
    targets  the names of the decoder's matrices that get one, in all layers
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        settle(self, rank=whole("rank", self.rank, 1), alpha=number("alpha", self.alpha, 0, MOST, above=True))
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout: expected a probability below 1, got {shown(self.dropout)}")
        if not self.targets or set(self.targets) - set(TARGETS):
            raise InputError(f"targets: expected some of {', '.join(TARGETS)}, got {shown(self.targets)}")


class LoRALinear(nn.Linear):
    """x [..., in] → W x + b + alpha / r · B A dropout(x), [..., out]. B begins at 0, and with it the sum.

    W and b keep their names. A [r, in] and B [out, r] are float32, and have PEFT's names.
    """

    def __init__(self, linear: nn.Linear, options: LoRA, device: torch.device):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.dropout, self.scale = options.dropout, options.alpha / options.rank
        self.lora_A = nn.Linear(linear.in_features, options.rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(options.rank, linear.out_features, bias=False, device=device, dtype=torch.float32)
        nn.init.zeros_(self.lora_B.weight)
        self.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        read = F.dropout(x.to(self.lora_A.weight.dtype), self.dropout, self.training)
        return y + (self.lora_B(self.lora_A(read)) * self.scale).to(y.dtype)


def add_lora(model: LlavaNetwork, options: LoRA, seed: int, device: torch.device) -> None:
    """Put a LoRALinear in the place of each target, its products on `device`. A's random values follow from the seed.

    Raises InputError.
    """
    narrowest = min(model.config.text.hidden_size, model.config.text.intermediate_size)
    whole("rank", options.rank, 1, narrowest)
    torch.manual_seed(seed)
    for layer in model.language_model.model.decoder_layers():
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if name in options.targets and isinstance(linear, nn.Linear):
                    setattr(part, name, LoRALinear(linear, options, device))


@torch.no_grad()
def widen(model: Llava, trained: Collection[str]) -> None:
    """Of a model that was loaded in bfloat16, have the parameters that are `trained`, by name, in float32, as they are stored."""
    for name, stored in read_headers(model.folder).items():
        if name in trained:
            with open_safetensors(stored.file) as file:
                model.get_parameter(name).data = file.get_tensor(stored.key).to(model.device, torch.float32)
