"""What a run with LoRA has learned, as PEFT keeps it: adapter_config.json and adapter_model.safetensors, in a folder.

PEFT loads the folder onto the model that the run began from, in transformers. Parts that are trained as a whole are among
PEFT's `modules_to_save`. What a sampler has learned lies beside them in its own file, which PEFT does not look at.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialise

from ..arguments import brief
from ..distributed.processes import Process, whole
from ..errors import CheckpointError, InputError
from ..files.reading import FILE, kind, named, open_safetensors
from ..files.writing import replace
from ..load import Llava, load
from ..loading.json_fields import JsonFields
from ..loading.model_folder import LEARNED
from ..loading.weights import STORED_DTYPES, canonical_name
from ..model import LlavaNetwork
from ..samplers.hooks import BeforeLLM
from ..samplers.learned_file import save_learned
from .lora import LoRA

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# PEFT's names begin with this, and go on with those of transformers 5 in memory.
_PREFIX = "base_model.model."
_LAYERS, _LAYERS_THERE = "language_model.model.layers.", "model.language_model.layers."
WHOLE = {"vision": "vision_tower", "projector": "multi_modal_projector"}  # parts → PEFT's modules_to_save
SAMPLERS = {"selector": "vision", "router": "avg-llava"}  # what samplers learn → one of these

# Keys of adapter_config.json that say nothing of what an adapter computes, and values of others that ask for nothing more.
_SAYS_NOTHING = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "modules_to_save", "peft_version"),
    *("revision", "target_modules", "exclude_modules", "task_type", "megatron_core", "qalora_group_size"),
    *("layers_to_transform", "layers_pattern", "ensure_weight_tying", "loftq_config"),
}
_OTHERWISE = {"bias": "none", "init_lora_weights": True}
_FOLLOWED = ("peft_type", "r", "lora_alpha", "use_rslora")


def save_adapter(
    model: LlavaNetwork, sampler: BeforeLLM | None, options: LoRA, base: str, parts: Collection[str], folder: Path
) -> None:
    """Write the adapter of a model that has LoRA (`lora.add_lora`), and what its sampler has learned.

    base   the folder of the model that it is for, as adapter_config.json names it
    parts  those of WHOLE that are trained, and so are stored as they now are

    Of a sharded model all processes take part, and the first writes. Raises InputError for values that are not finite, and where
    the folder cannot be written.
    """
    modules = [WHOLE[part] for part in WHOLE if part in parts]
    tensors = {}
    for name, value in model.state_dict().items():
        if ".lora_" in name:
            tensors[_PREFIX + _LAYERS_THERE + name.removeprefix(_LAYERS)] = value
        elif name.partition(".")[0] in modules:
            tensors[f"{_PREFIX}model.{name}"] = value
    tensors = {name: whole(value.detach()).cpu().contiguous() for name, value in tensors.items()}
    if Process.current().rank:
        return
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise InputError(f"{name}: expected finite values, got others")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "bias": "none",
        "target_modules": rf".*language_model.*\.({'|'.join(options.targets)})",  # the tower has a q_proj, too
        "modules_to_save": modules or None,
        "inference_mode": True,
        "task_type": None,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_learned(sampler, folder)
    except OSError as error:
        raise InputError(f"{named(folder)}: cannot be written: {error.strerror}") from error
    replace(folder / TENSORS, lambda file: file.write_bytes(serialise(tensors, {"format": "pt"})))
    replace(folder / CONFIG, lambda file: file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"))


@torch.no_grad()
def merge_adapter(model: LlavaNetwork, folder: Path) -> None:
    """Make an adapter a part of the model that it is for: W + alpha / r · B A for its matrices, and the parts that it has whole.

    It is computed in float32 and rounded to the model's dtype. Adapters that PEFT wrote for the decoder are taken, too. Raises
    CheckpointError for one that is not LoRA alone, or that does not fit the model; the model is then as it was.
    """
    rank, scale = _read_config(folder / CONFIG)
    file = folder / TENSORS
    with open_safetensors(file) as stored:
        found = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (not a mapping)
    if not found:
        raise CheckpointError(f"{file}: expected an adapter's tensors, found none")
    own = dict(model.named_parameters())

    def take(key: str, *shape: int) -> torch.Tensor:
        value = found.get(key)
        if value is None or value.shape != shape or value.dtype not in STORED_DTYPES.values():
            got = "no such tensor" if value is None else f"{tuple(value.shape)} of {value.dtype}"
            raise CheckpointError(f"{file}: {brief(key)}: expected floating-point values of shape {shape}, got {got}")
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"{file}: {brief(key)}: expected finite values, got others")
        return value.float()

    parts: dict[str, torch.Tensor] = {}
    products: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for key in found:
        beginning, of_product, end = key.partition(".lora_")
        name = canonical_name(beginning.removeprefix(_PREFIX)) + (".weight" if of_product else "")
        there = own.get(name)
        if not key.startswith(_PREFIX) or there is None or (of_product and end not in ("A.weight", "B.weight")):
            raise CheckpointError(
                f"{file}: {brief(key)}: expected tensors that the model has a place for, got this one"
            )
        if not of_product:
            parts[name] = take(key, *there.shape)
        elif there.dim() == 2:
            rows, columns = there.shape
            b, a = take(f"{beginning}.lora_B.weight", rows, rank), take(f"{beginning}.lora_A.weight", rank, columns)
            products[name] = b, a
        else:
            raise CheckpointError(f"{file}: {brief(key)}: expected one for a matrix, got one for {tuple(there.shape)}")
    for name, value in parts.items():
        own[name].copy_(value)
    for name, (b, a) in products.items():
        own[name].copy_(own[name].float() + scale * (b.to(model.device) @ a.to(model.device)))


def merged_model(base: Path, folder: Path) -> Llava:
    """The model in folder `base`, in the dtype that it is stored in, with an adapter and what a sampler learned beside it.

    Raises CheckpointError.
    """
    model = load(base, "none")
    merge_adapter(model, folder)
    for name in LEARNED:
        if kind(folder / name) == FILE:
            part = name.partition(".")[0]
            model.set_sampler(SAMPLERS[part], **{part: folder / name})  # type: ignore[arg-type]
    return model


def _read_config(file: Path) -> tuple[int, float]:
    """The rank, and the factor of the products. Whatever else would change the logits is refused."""
    fields = JsonFields.of_file(file)
    fields.choice("peft_type", "", ("LORA",))
    rank, alpha = fields.integer("r", None), fields.number("lora_alpha", None)
    root = fields.boolean("use_rslora", False)
    for key in fields.members.keys() - _SAYS_NOTHING - {*_FOLLOWED}:
        value: Any = fields.get(key)
        plain = value in (None, False) or value == {} or value == [] or (key in _OTHERWISE and value == _OTHERWISE[key])
        fields.check(key, plain, "nothing beyond plain LoRA")
    return rank, alpha / (rank**0.5 if root else rank)
