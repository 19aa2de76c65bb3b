"""Linear layers whose weights are int8 or int4: how a weight becomes such, and how it is multiplied with.

int8  weight[o, i] = scale[o] · q, with q from -127 to 127
int4  weight[o, i] = zero[o, g] + scale[o, g] · (q - 8), with q from 0 to 15 and a group g of 64 inputs

Few rows of input, such as an answer's next token, are multiplied by torch's own operators, which read the weights as they
are stored. Many rows, such as a prompt's, take less time where a part of the weights after another becomes floating-point and
is multiplied as usual. The operators' names are private to torch, so that each is tried before it is relied on.

Activations, scales and zeros are bfloat16, for which alone the operators are fast. Shapes: N rows, out × in weights.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from functools import cache

import torch
from torch import nn

from .errors import InputError

NAMES = ("int8", "int4")
PART = 2**21  # weights that are floating-point at a time on a CPU: 4 MB in bfloat16, which its caches hold
GROUP = 64  # inputs that share a scale and a zero in int4
ROWS = 64  # outputs whose int4 weights are stored together
_LARGEST = torch.finfo(torch.bfloat16).max
_SMALLEST = torch.finfo(torch.bfloat16).tiny

_log = logging.getLogger("minifocus")


class QuantizedLinear(nn.Module, ABC):
    """y = x · weightᵀ + bias, x [..., in] → [..., out] in x's dtype; the weight gets no gradient.

    weight, weight_scale  what `quantize` makes of a floating-point weight
    """

    most_rows: int  # for more, the operator takes longer than `multiply`
    devices: tuple[str, ...]  # that the operator is for
    weight: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None, device: torch.device):
        super().__init__()
        self.in_features, self.out_features, self.bias = in_features, out_features, bias
        for name, (shape, dtype) in self.layout(in_features, out_features).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise InputError("model: int8 and int4 weights hand on no gradient: call it in torch.no_grad()")
        rows = x.reshape(-1, self.in_features)
        y = self.operator(aligned(rows.contiguous())) if self.operator_takes(rows) else self.multiply(rows)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def operator_takes(self, rows: torch.Tensor) -> bool:
        """Whether torch's operator is right, and faster than `multiply`, for rows [N, in]."""
        return (
            0 < len(rows) <= self.most_rows
            and rows.dtype == self.weight_scale.dtype == torch.bfloat16
            and rows.device.type in self.devices
            and self.in_features % 16 == 0  # the operator reads so many at once, and would read past a row's end
            and self.in_features * self.out_features < 2**31  # it counts in 32 bits
            and operator_works(type(self), rows.device.type)
        )

    def train(self, mode: bool = True) -> QuantizedLinear:
        """Refuses to train: raises InputError."""
        if mode:
            raise InputError("model: int8 and int4 weights cannot be trained: load the model that they were made of")
        super().train(mode)
        return self

    @staticmethod
    @abstractmethod
    def layout(in_features: int, out_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The shape and dtype of `weight` and of `weight_scale`."""

    @staticmethod
    @abstractmethod
    def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A floating-point weight [out, in] → `weight` and `weight_scale`, on its device."""

    @staticmethod
    @abstractmethod
    def sound(weight_scale: torch.Tensor) -> bool:
        """Whether scales are above 0, and the weights that they stand for finite in bfloat16."""

    @abstractmethod
    def operator(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [N, in] bfloat16 → [N, out], by torch's operator."""

    @abstractmethod
    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [N, in] of any dtype → [N, out], by floating-point weights."""


class Int8Linear(QuantizedLinear):
    """weight int8 [1, out, in]; weight_scale bfloat16 [out].

    The first axis makes transformers refuse the folder, which would else take the whole numbers for weights.
    """

    most_rows = 10
    devices = ("cpu", "cuda")

    @staticmethod
    def layout(in_features: int, out_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {
            "weight": ((1, out_features, in_features), torch.int8),
            "weight_scale": ((out_features,), torch.bfloat16),
        }

    @staticmethod
    def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, scales = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(len(weight), dtype=torch.bfloat16)
        count = max(1, PART // weight.shape[1])
        for part, own, scale in zip(weight.split(count), q.split(count), scales.split(count), strict=True):
            values = part.to(torch.float32, copy=True)
            scale.copy_(_usable(values.abs().amax(1) / 127))
            own.copy_(values.div_(scale.float()[:, None]).round_().clamp_(-127, 127))
        return q[None], scales

    @staticmethod
    def sound(weight_scale: torch.Tensor) -> bool:
        return bool(((weight_scale > 0) & (weight_scale.float() * 127 <= _LARGEST)).all())

    def operator(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int8pack_mm(rows, self.weight[0], self.weight_scale)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        # bfloat16 holds each q exactly: the product is scaled, not the weights.
        count = max(1, part_of(rows.device, self.weight.numel()) // self.in_features)
        weight, y = rows.new_empty(count, self.in_features), rows.new_empty(len(rows), self.out_features)
        for part, own in zip(self.weight[0].split(count), y.split(count, dim=1), strict=True):
            torch.mm(rows, weight[: len(part)].copy_(part).T, out=own)
        return y.mul_(self.weight_scale)


class Int4Linear(QuantizedLinear):
    """weight uint8 [out / 64, in, 32]; weight_scale bfloat16 [in / 64, out, 2], a scale and a zero. 64 divides in and out.

    Byte weight[b, i, j] holds q of output 64 b + j in its lower half, of 64 b + j + 32 in its upper. That is what torch's
    operator reads on a processor with AVX-512, where weights can so stay mapped; for others they are packed anew once.
    """

    most_rows = 64
    devices = ("cpu",)

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None, device: torch.device):
        super().__init__(in_features, out_features, bias, device)
        self.packed: tuple[torch.Tensor, torch.Tensor] | None = None  # a weight, and the same as the operator reads it

    @staticmethod
    def takes(in_features: int, out_features: int) -> bool:
        return in_features % GROUP == 0 and out_features % ROWS == 0

    @staticmethod
    def layout(in_features: int, out_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {
            "weight": ((out_features // ROWS, in_features, ROWS // 2), torch.uint8),
            "weight_scale": ((in_features // GROUP, out_features, 2), torch.bfloat16),
        }

    @staticmethod
    def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (shape, _), (scale_shape, _) = Int4Linear.layout(weight.shape[1], weight.shape[0]).values()
        q, scales = weight.new_empty(shape, dtype=torch.uint8), weight.new_empty(scale_shape, dtype=torch.bfloat16)
        count = max(1, PART // weight[:ROWS].numel())
        for part, own, of_part in zip(
            weight.split(count * ROWS), q.split(count), scales.split(count * ROWS, dim=1), strict=True
        ):
            values = part.to(torch.float32, copy=True).unflatten(1, (-1, GROUP))  # [outputs, groups, 64]
            low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
            zero = (low / 15 * 7 + high / 15 * 8).bfloat16().float()
            # Of the scale that the rounded zero needs: with it, no value is further from its own than half a step.
            scale = _usable(torch.maximum((zero - low) / 8, (high - zero) / 7), up=True).float()
            of_part.copy_(torch.cat([scale, zero], -1).transpose(0, 1))
            values.sub_(zero).div_(scale).add_(8).round_().clamp_(0, 15)
            steps = values.to(torch.uint8).view(-1, ROWS, part.shape[1])
            own.copy_((steps[:, : ROWS // 2] | steps[:, ROWS // 2 :] << 4).transpose(1, 2))
        return q, scales

    @staticmethod
    def sound(weight_scale: torch.Tensor) -> bool:
        scale, zero = weight_scale.float().unbind(-1)
        return bool(((scale > 0) & (zero.abs() + 8 * scale <= _LARGEST)).all())

    def operator(self, rows: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if not stored_as_read():
            if self.packed is None or self.packed[0] is not weight:
                self.packed = weight, torch.cat([_packed(block) for block in weight.split(16)])
            weight = self.packed[1]
        weight = weight.view(self.out_features, self.in_features // 2)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, weight, GROUP, self.weight_scale)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        inputs, blocks, half = self.in_features, len(self.weight), ROWS // 2
        most = max(1, part_of(rows.device, ROWS * inputs * blocks) // (ROWS * inputs))
        count = max(number for number in range(1, most + 1) if blocks % number == 0)
        # All parts use the same memory: new memory would cost as much time as the work.
        halves = self.weight.new_empty(2, count, inputs, half)
        steps = self.weight.new_empty(inputs, count, 2, half)
        values = rows.new_empty(inputs // GROUP, GROUP, count * ROWS, dtype=torch.float32)
        weight, y = rows.new_empty(inputs, count * ROWS), rows.new_empty(len(rows), self.out_features)
        scale, zero = (one.contiguous()[:, None] for one in self.weight_scale.float().unbind(-1))
        zero = zero - 8 * scale
        for begin in range(0, blocks, count):
            part, own = self.weight[begin : begin + count], slice(begin * ROWS, (begin + count) * ROWS)
            torch.bitwise_and(part, 15, out=halves[0])
            torch.bitwise_right_shift(part, 4, out=halves[1])
            steps.view(torch.int64).copy_(halves.view(torch.int64).permute(2, 1, 0, 3))  # eight bytes at a time
            values.copy_(steps.view(values.shape))
            torch.addcmul(zero[..., own], values, scale[..., own], out=values)
            torch.mm(rows, weight.copy_(values.flatten(0, 1)), out=y[:, own])
        return y


def exchange(network: nn.Module, kind: str | None, tied: bool) -> dict[str, QuantizedLinear]:
    """Put layers of `kind` in place of the decoder's linear layers, and of the head unless it is `tied` to the embeddings.

    The head, and what int4 does not take for its size, become int8. None changes nothing. Returns the new layers by name;
    their values are not set.
    """
    layers: dict[str, QuantizedLinear] = {}
    for name, module in list(network.named_modules()) if kind else ():
        head = name == "language_model.lm_head" and not tied
        if isinstance(module, nn.Linear) and (head or name.startswith("language_model.model.layers.")):
            narrow = kind == "int4" and not head and Int4Linear.takes(module.in_features, module.out_features)
            made = (Int4Linear if narrow else Int8Linear)(
                module.in_features, module.out_features, module.bias, module.weight.device
            )
            network.set_submodule(name, made)
            layers[name] = made
    return layers


def aligned(value: torch.Tensor) -> torch.Tensor:
    """The same values from an address that is a multiple of 32 bytes, which the operators' instructions may want."""
    return value if value.data_ptr() % 32 == 0 else value.clone()


def part_of(device: torch.device, weights: int) -> int:
    """How many of so many weights are floating-point at a time: on a GPU all, as a part is a dozen launches."""
    return PART if device.type == "cpu" else weights


@cache
def operator_works(kind: type[QuantizedLinear], device: str) -> bool:
    """Whether torch's operator for such layers is there on a device, and right. If not, the log says why, once."""
    generator = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(count, 128, generator=generator, device="cpu").to(device) for count in (192, 5))
    layer = kind(128, 192, None, weight.device)
    layer.weight, layer.weight_scale = kind.quantize(weight)
    expected = layer.multiply(rows.bfloat16().float())
    try:
        found = layer.operator(rows.bfloat16()).float()
        reason = f"its result is off by {(found - expected).abs().max():.3g}"
    except (AttributeError, RuntimeError, TypeError) as error:  # no such operator, or another under its name
        found, reason = torch.full_like(expected, torch.nan), str(error).splitlines()[0][:200]
    if torch.allclose(found, expected, rtol=2**-7, atol=2**-7 * float(expected.abs().max())):
        return True
    _log.warning(
        "%s: torch's operator is not used on %s, which makes answers slower: %s", kind.__name__, device, reason
    )
    return False


@cache
def stored_as_read() -> bool:
    """Whether torch's int4 operator reads the bytes in the order in which `Int4Linear` stores them."""
    block = torch.arange(2 * ROWS * ROWS // 2).view(1, -1, ROWS // 2).to(torch.uint8)
    return torch.equal(_packed(block).view(-1), block.view(-1))


def _packed(weight: torch.Tensor) -> torch.Tensor:
    """Bytes of `Int4Linear` in the order of torch's int4 operator, [outputs, in / 2]."""
    steps = torch.cat([weight & 15, weight >> 4], dim=-1).transpose(1, 2).flatten(0, 1)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(steps.int().contiguous(), 1)


def _usable(scale: torch.Tensor, up: bool = False) -> torch.Tensor:
    """Scales ≥ 0 as bfloat16 that can be divided by, rounded to the nearest or upwards; 1 stands for zero."""
    scale = torch.where(scale == 0, 1, scale.clamp(min=_SMALLEST))
    if up:
        scale = ((scale.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
    return scale.bfloat16()
