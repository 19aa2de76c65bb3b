"""Training over processes that each hold a share of the model, by PyTorch's own FSDP2 (`fully_shard`).

Each decoder layer and each block of the tower is a group whose matrices are gathered when it is run and given up afterwards.
The others (embeddings, head, norms, projector, sampler) are gathered once for a forward and its backward pass, as they are used
outside of their modules' own `forward`. Each process reads its own rows of the folder's tensors, and a trained model is gathered
and written one file after another.

All processes have to gather the same groups in the same order, or they would wait for each other for ever. Where their examples
differ, `ShardedObjective` and `_GatheringSampler` see to that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ..arguments import brief
from ..distributed.processes import Process, whole
from ..errors import CheckpointError, InputError
from ..files.reading import named, open_safetensors
from ..inputs.processor import Processor
from ..load import Llava
from ..loading.config import Config, load_config
from ..loading.model_folder import Origin, finish_save, replacing, stamps
from ..loading.weights import (
    check_layer_counts,
    check_names_and_shapes,
    read_headers,
    save_model,
    shapes_of,
    without_values,
)
from ..samplers.hooks import BeforeLLM, Samplers
from ..samplers.learned_file import save_learned
from ..samplers.text_guided import TextGuidedSampler
from .examples import Batch
from .objective import AnswerObjective

SMALL = ("multi_modal_projector.", "image_newline")  # what `skeleton` reads as a whole, as it may begin anew


def skeleton(folder: Path, sampler: Callable[[Config], Samplers]) -> Llava:
    """The model of a folder whose weights are still on the meta device, but for the projector and what `sampler` has learned.

    `shard` reads the others. Raises CheckpointError for a bad folder, and InputError for one whose head is tied.
    """
    finish_save(folder)
    origin = Origin.read(folder)
    config = load_config(folder)
    if config.tie_word_embeddings:
        raise InputError(
            f"shard: expected a model whose head is its own, got one with tied embeddings: {named(folder)}"
        )
    processor = Processor.from_folder(folder, config)
    found = read_headers(folder)
    check_layer_counts(found, config, folder)
    model = cast(Llava, without_values(lambda: Llava(config, processor, origin)))
    check_names_and_shapes(found, shapes_of(model), folder)
    values = {}
    for name, stored in found.items():
        if name.startswith(SMALL):
            with open_safetensors(stored.file) as file:
                values[name] = file.get_tensor(stored.key).float()
    model.load_state_dict(values, strict=False, assign=True)
    method = sampler(config)
    model.before_llm, model.inside_llm = method.before, method.inside
    if model.before_llm is not None:
        model.before_llm.float()  # what it has learned may be stored in another dtype
    return model.eval()


def shard(task: ShardedObjective, device: torch.device, trained: Callable[[str], bool], narrow: bool = False) -> None:
    """Give this process its share of a task whose model is a `skeleton`, and read it, in float32.

    trained  whether a parameter of the task is, by its name
    narrow   those that are not are in bfloat16

    Raises CheckpointError, in all processes, where the folder's values are not finite or its files have changed.
    """
    model = task.model
    values = {name: p.detach().float() for name, p in task.named_parameters() if not p.is_meta}
    task.unsharded_sampler = (copy.deepcopy(model.before_llm),)
    task.to("meta")
    for name, parameter in task.named_parameters():
        parameter.requires_grad_(trained(name))
        if narrow and not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
        elif parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    process = Process.current()
    mesh = init_device_mesh(device.type, (process.count,))
    for group in (*model.language_model.model.layers, *model.vision_tower.encoder.layers):
        fully_shard(group, mesh=mesh)
    fully_shard(task, mesh=mesh, reshard_after_forward=False)
    task.to_empty(device=device)
    model.language_model.model.embed_tokens.register_forward_hook(_reach)
    if isinstance(model.inside_llm, TextGuidedSampler):
        model.inside_llm = _GatheringSampler(model.inside_llm.options, model.inside_llm.config)

    refused: CheckpointError | None = None
    try:
        _read_rows(task, values, process)
    except CheckpointError as error:
        refused = error
    for found in process.gather(refused):
        if found is not None:
            raise found


@torch.no_grad()
def _read_rows(task: ShardedObjective, values: dict[str, torch.Tensor], process: Process) -> None:
    """Fill each parameter's own rows from `values`, or else from the folder."""
    origin = cast(Llava, task.model).origin
    found = {f"model.{name}": stored for name, stored in read_headers(origin.folder).items()}
    for name, parameter in task.named_parameters():
        own = cast(DTensor, parameter).to_local()
        size = parameter.shape[0]
        each = -(-size // process.count)
        rows = slice(min(process.rank * each, size), min((process.rank + 1) * each, size))
        if name in values:
            own.copy_(values[name][rows])
        elif len(own):
            with open_safetensors(found[name].file) as file:
                own.copy_(file.get_slice(found[name].key)[rows])
        if name in found and not bool(own.isfinite().all()):
            where = f"{found[name].file}: {brief(found[name].key)}"
            raise CheckpointError(f"{where}: holds NaN or infinite values (as {own.dtype})")
    if stamps(origin.folder) != origin.stamps:
        raise CheckpointError(f"{origin.folder}: its files were changed while they were read: load it again")


def _reach(embed_tokens: nn.Module, ids: Any, embeddings: torch.Tensor) -> torch.Tensor:
    """Have the gradient reach the decoder's input, also where nothing before it is trained and of text alone.

    So every process gathers every layer for the backward pass, and sends what its layers have learned in the same order.
    """
    return embeddings.requires_grad_() if torch.is_grad_enabled() else embeddings


class ShardedObjective(AnswerObjective):
    """The objective, of which every micro-batch gathers the same groups and gives every trained parameter a gradient.

    Text alone reads no tower, a sample may be left unpooled: then the tower is run on a tile of zeros, and what was not used
    is added times 0.
    """

    unsharded_sampler: tuple[BeforeLLM | None] = (None,)  # a copy, no module of this one: see `sampler_to_save`

    def forward(self, batch: Batch, num_targets: int, num_batches: int) -> tuple[torch.Tensor, dict[str, float]]:
        model = self.model
        rest = (p for name, p in self.named_parameters() if p.requires_grad and ".layers." not in name)
        nothing = sum((parameter.float().sum() for parameter in rest), start=torch.zeros((), device=model.device))
        if not batch.tiles:  # before the decoder, as in the other processes
            side = model.config.vision.image_size
            states = model.vision_tower(torch.zeros(1, 3, side, side, device=model.device, dtype=model.dtype))
            nothing = nothing + model.multi_modal_projector(model.vision_tower.features(states)).float().sum()
        loss, figures = super().forward(batch, num_targets, num_batches)
        return loss + 0.0 * nothing, figures


class _GatheringSampler(TextGuidedSampler):
    """The text-guided sampler, which uses a layer's projections before the layer is run: the layer is gathered for it.

    Other processes gather it a moment later, when they run it.
    """

    def score(self, layer: Any, *arguments: Any) -> torch.Tensor:
        layer.unshard()
        return super().score(layer, *arguments)


@contextmanager
def gathered_rest(task: nn.Module) -> Iterator[None]:
    """Within it a sharded task's model can be asked, by all processes at once: what is no layer or block is gathered."""
    root = cast(FSDPModule, task)
    root.unshard()
    try:
        yield
    finally:
        root.reshard()


def sampler_to_save(task: nn.Module) -> BeforeLLM | None:
    """The sampler of a task's model. Of a sharded one all processes gather what it has learned, and have it in a copy."""
    if not isinstance(task, ShardedObjective):
        return cast(BeforeLLM | None, cast(Any, task).model.before_llm)
    (sampler,) = task.unsharded_sampler
    if sampler is not None:
        own = cast(nn.Module, task.model.before_llm).state_dict()
        sampler.load_state_dict({name: whole(value) for name, value in own.items()})
    return sampler


def save_shared(task: ShardedObjective, folder: Path) -> None:
    """Have the first process write the trained model, as `Llava.save` does. The others give it their rows.

    A tensor at a time is whole, and as many as are in one file. Raises InputError, in the first process alone, where the folder
    cannot be written: torchrun then ends the others.
    """
    model, sampler = cast(Llava, task.model), sampler_to_save(task)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("before_llm.")}
    if Process.current().rank:
        for value in state.values():  # in the order in which the first process writes them
            whole(value)
        return
    try:
        with replacing(folder) as fresh:
            save_model(state, model.origin.companions, fresh, model.config, check_finite=True)
            save_learned(sampler, fresh)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{named(folder)}: expected a folder that can be written: {error}") from error
