"""Layers with int8 or int4 weights as they are exported: the same products as quantized.py's, without a loop or a choice.

Which way a product goes there depends on the number of rows. Here it is settled when a part is exported: one row, a prompt's
last or an answer's next, by torch's operator, and any other number by weights in bfloat16.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod

import torch
from torch import nn

from ..quantized import GROUP, ROWS, Int4Linear, Int8Linear, QuantizedLinear, operator_works, stored_as_read
from .parts import Part


class _Exported(nn.Module, ABC):
    """x [..., in] → [..., out], with the weights of `layer` under the same names."""

    weight: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, layer: QuantizedLinear):
        super().__init__()
        self.out_features, self.bias = layer.out_features, layer.bias
        self.register_buffer("weight", layer.weight)
        self.register_buffer("weight_scale", layer.weight_scale)
        one = layer.weight_scale.new_empty(1, layer.in_features)
        self.by_operator = layer.operator_takes(one) and operator_works(type(layer), "cpu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        # A number of rows that varies is no int when a part is exported.
        one = isinstance(rows.shape[0], int) and rows.shape[0] == 1
        y = self.operator(rows) if one and self.by_operator else self.multiply(rows)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    @abstractmethod
    def operator(self, rows: torch.Tensor) -> torch.Tensor:
        """One row [1, in] → [1, out], by torch's operator."""

    @abstractmethod
    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [N, in] → [N, out], by weights in bfloat16."""


class _ExportedInt8(_Exported):
    def operator(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int8pack_mm(rows, self.weight[0], self.weight_scale)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.mm(rows, self.weight[0].to(rows.dtype).T) * self.weight_scale


class _ExportedInt4(_Exported):
    def __init__(self, layer: QuantizedLinear):
        super().__init__(layer)
        self.by_operator = self.by_operator and stored_as_read()

    def operator(self, rows: torch.Tensor) -> torch.Tensor:
        weight = self.weight.view(self.out_features, rows.shape[1] // 2)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, weight, GROUP, self.weight_scale)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        steps = torch.stack([self.weight & 15, self.weight >> 4], dim=2)  # [out / 64, in, 2, 32]
        values = steps.permute(1, 0, 2, 3).reshape(-1, GROUP, self.weight.shape[0] * ROWS).float()
        scale, zero = (one[:, None] for one in self.weight_scale.float().unbind(-1))
        weight = torch.addcmul(zero - 8 * scale, values, scale).flatten(0, 1)
        return torch.mm(rows, weight.to(rows.dtype))


def exportable(part: Part) -> Part:
    """The part, or a copy of it where it has quantised layers."""
    if not any(isinstance(module, QuantizedLinear) for module in part.modules()):
        return part
    own = copy.deepcopy(part)
    for name, module in list(own.named_modules()):
        if isinstance(module, Int8Linear):
            own.set_submodule(name, _ExportedInt8(module))
        elif isinstance(module, Int4Linear):
            own.set_submodule(name, _ExportedInt4(module))
    return own
