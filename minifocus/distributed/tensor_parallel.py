"""A decoder that processes share (tensor parallelism): together they answer as one process does that holds all of it.

Of every layer each process has some of the heads, and the MLP's channels that go with its number: q, k, v, gate and up by their
outputs, o and down by their inputs, so that their products are added up, twice a layer (Megatron-LM; Shoeybi et al. 2019). Of the
output head each has some of the words. All else is whole in every process, and computed by all: tower, projector, embeddings,
norms and what samplers have learned. A cache holds the keys and values of a process's own heads.

    model = minifocus.distributed.tensor_parallel.load("DIR", "text", device="cuda")  # in every process that torchrun started
    answer = model.generate("photo.jpg", "What does the sign say?")

Methods inside the language model are shown every layer with the queries and keys of all heads: Eq. 7 has a maximum over heads,
others have means, and no process has them all. What is decided comes from the first process, so that a last bit in which two
differ never leaves them with different tokens. All processes have to make the same calls.
"""

from __future__ import annotations

import copy
import hashlib
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ..arguments import brief
from ..errors import CheckpointError, InputError
from ..inputs.processor import Images, Processor
from ..llama import DecoderLayer, LayerCache
from ..load import Llava, open_model, usable_device
from ..loading.config import Config
from ..loading.model_folder import Origin
from ..loading.weights import HEAD, LAYERS, Places, Progress
from ..methods import SamplerOptions
from ..model import LlavaNetwork, Prefill
from ..rows import Rows
from ..samplers.hooks import Context, InsideLLM, Samplers, Selection, VisualTokens
from ..stream import Stream
from ..trace import Answer
from .processes import Process

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..generation_options import GenerationOptions

BY_OUTPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
BY_INPUTS = ("self_attn.o_proj", "mlp.down_proj")


class TensorParallelLlava(Llava):
    """A process's share of a model, as `load` returns it. It answers; it is not trained, and not saved."""

    def _use(self, method: Samplers) -> None:
        super()._use(method)
        self.inside_llm = None if method.inside is None else _WithAllHeads(method.inside)

    def set_sampler(self, name: str, **options: Unpack[SamplerOptions]) -> None:
        expect_same("sampler", (name, options))
        super().set_sampler(name, **options)

    def generate_batch(
        self, images: Sequence[Images], prompts: Sequence[str], **options: Unpack[GenerationOptions]
    ) -> list[Answer]:
        return super().generate_batch(images, prompts, **_together(prompts, options))

    def stream(self, image: Images, prompt: str, **options: Unpack[GenerationOptions]) -> Stream:
        """As `Llava.stream`; every process has to iterate to the end."""
        return super().stream(image, prompt, **_together(prompt, options))

    def prefill(
        self,
        rows: Rows,
        pictures: list[list[VisualTokens]],
        caches: list[LayerCache] | None = None,
        last: int | None = None,
    ) -> Prefill:
        """As `LlavaNetwork.prefill`, of the first process's hidden states; InputError where others have other tokens."""
        tokens = torch.stack([rows.source, rows.positions, rows.picture, rows.valid.long()])
        expect_same("prompts and pictures", (*tokens.shape, hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()))
        hidden = rows.hidden.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(hidden, 0)
        return super().prefill(rows.with_hidden(hidden), pictures, caches, last)

    def save(self, folder: str | PathLike[str], *, check_finite: bool = True) -> None:
        raise InputError("save: expected a model that one process holds, got a share of one: copy its folder instead")


def load(
    folder: str | PathLike[str],
    sampler: str = "focus",
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    *,
    check_finite: bool = True,
    progress: Progress | None = None,
    **options: Unpack[SamplerOptions],
) -> TensorParallelLlava:
    """`minifocus.load`, by all processes that torchrun started: of what is shared each reads its own part alone.

    device  "cuda" means the GPU of the process's number on its machine

    Raises InputError for a decoder that cannot be shared evenly, for int8 and int4 weights, and for a process that was not
    started by torchrun. This and what `minifocus.load` raises is raised in all processes, if in one.
    """
    if not dist.is_initialized() and not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        raise InputError(
            "tensor parallel: expected a process that torchrun started, got one without RANK and WORLD_SIZE"
        )
    own = device_of_process(device)
    process = Process.join(own, even_alone=True)
    refused: CheckpointError | InputError | None = None
    try:
        model = open_model(_build, _share, folder, sampler, own, dtype, check_finite, progress, options)
    except (CheckpointError, InputError) as error:
        refused = error
    for found in process.gather(refused):
        if found is not None:
            raise found
    sizes = {name: None if stamp is None else stamp[0] for name, stamp in model.origin.stamps.items()}
    expect_same("folder, sampler and dtype", (sizes, sampler, options, str(model.dtype)))
    for layer in model.language_model.model.decoder_layers() if process.rank else ():
        for name in BY_INPUTS:
            cast(nn.Linear, layer.get_submodule(name)).register_parameter(
                "bias", None
            )  # added once, by the first process
    return model.requires_grad_(False)


def device_of_process(name: str | torch.device) -> torch.device:
    """The device of that name; of "cuda" the process's own. Raises InputError where it cannot be used."""
    if str(name) == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = usable_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def expect_same(what: str, value: object) -> None:
    """Refuse, in all processes, what is not the same in all: they would wait for each other for ever, or answer nonsense."""
    found = Process.current().gather(repr(value))
    if len(set(found)) > 1:
        raise InputError(f"{what}: expected the same in all processes, got {', '.join(map(brief, found))}")


def _together(prompts: object, options: Mapping[str, object]) -> Any:
    """The options of a question that all processes ask. Without a seed each would draw its own tokens: all have the first's."""
    expect_same("prompts and options", (prompts, options))
    seed = options.get("seed")
    return {**options, "seed": Process.current().gather(secrets.randbits(62))[0] if seed is None else seed}


# ---- what a process holds ----


def _build(config: Config, processor: Processor, origin: Origin) -> TensorParallelLlava:
    """Raises InputError for a decoder that cannot be shared."""
    count, text = Process.current().count, config.text
    if config.quantized:
        raise InputError(f"tensor parallel: expected a floating-point dtype, got {config.quantized}")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(text, name)
        if size % count:
            fitting = ", ".join(str(n) for n in range(1, min(size, 64) + 1) if size % n == 0)
            raise InputError(
                f"tensor parallel: {size} {name} cannot be shared evenly by {count} processes: expected a number that "
                f"divides it, such as {fitting}"
            )
    if _own(text.vocab_size).start >= text.vocab_size:
        raise InputError(f"tensor parallel: {text.vocab_size} vocab_size is too small for {count} processes")
    return TensorParallelLlava(config, processor, origin)


def _share(model: nn.Module) -> Places:
    """Leave of a model without values what this process holds; where that is in the folder's tensors."""
    decoder = cast(LlavaNetwork, model).language_model
    places = _keep_part(decoder.lm_head, HEAD.removesuffix(".weight"), 0)
    decoder.lm_head.register_forward_hook(lambda _, __, own: _gathered(own, decoder.model.config.vocab_size))
    for number, layer in enumerate(decoder.model.decoder_layers()):
        for name in BY_OUTPUTS:
            places |= _keep_part(cast(nn.Linear, layer.get_submodule(name)), f"{LAYERS}{number}.{name}", 0)
        for name in BY_INPUTS:
            linear = cast(nn.Linear, layer.get_submodule(name))
            places |= _keep_part(linear, f"{LAYERS}{number}.{name}", 1)
            linear.register_forward_hook(_added_up)
    return places


def _keep_part(linear: nn.Linear, name: str, axis: int) -> Places:
    """Leave of a layer this process's outputs (axis 0) or inputs (1). A bias has outputs alone."""
    places = {}
    for key, value in list(linear.named_parameters()):
        if axis < value.dim():
            place = (*[slice(None)] * axis, _own(value.shape[axis]))
            setattr(linear, key, nn.Parameter(value.detach()[place], requires_grad=False))
            places[f"{name}.{key}"] = place
    linear.out_features, linear.in_features = linear.weight.shape
    return places


def _own(size: int) -> slice:
    """This process's part of so many: all have as many, but for the last ones where they do not divide evenly."""
    process = Process.current()
    each = -(-size // process.count)
    return slice(process.rank * each, min((process.rank + 1) * each, size))


# ---- what processes send each other ----


def _added_up(_: nn.Module, __: Any, product: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' products, the same bits in each."""
    dist.all_reduce(product)
    return product


def _gathered(own: torch.Tensor, size: int) -> torch.Tensor:
    """The parts [..., n] of all processes, as `_own` has them, side by side: [..., size]."""
    count = dist.get_world_size()
    each = -(-size // count)
    filled = F.pad(own, (0, each - own.shape[-1])) if own.shape[-1] < each else own.contiguous()
    parts = [torch.empty_like(filled) for _ in range(count)]
    dist.all_gather(parts, filled)
    return torch.cat(parts, dim=-1)[..., :size]


class _AllOutputs(nn.Module):
    """A linear layer with the outputs of all processes, which call it together."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _gathered(self.linear(x), self.linear.out_features * dist.get_world_size())


class _WithAllHeads:
    """A method inside the language model, which sees the queries, keys and values of all heads. The first process decides."""

    def __init__(self, method: InsideLLM):
        self.method = method

    def __call__(self, index: int, layer: DecoderLayer, rows: Rows, context: Context) -> Selection | None:
        if context.previous is not None:
            previous, seen = context.previous
            context = replace(context, previous=(_with_all_heads(previous), seen))
        selection = self.method(index, _with_all_heads(layer), rows, context)
        if selection is None:
            return None
        kept = selection.kept.to(torch.uint8)
        dist.broadcast(kept, 0)
        return replace(selection, kept=kept.bool())


def _with_all_heads(layer: DecoderLayer) -> DecoderLayer:
    """What a method may look at of a layer before it is run. It is a copy, which shares all weights."""
    seen, attention = copy.copy(layer), copy.copy(layer.self_attn)
    attention._modules = {**attention._modules}
    for name in ("q_proj", "k_proj", "v_proj"):
        attention._modules[name] = _AllOutputs(cast(nn.Linear, attention._modules[name]))
    seen._modules = {**seen._modules, "self_attn": attention}
    return seen
