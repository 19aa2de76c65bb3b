"""What a sampler has learned, in a file of its own beside the model's: PART.safetensors, its options as metadata. Read strictly.

FocusLLaVA's selector is one such part. A further sampler says with `learned.register` what is kept of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path

import torch
from safetensors.torch import save as serialise

from ..arguments import shown
from ..errors import CheckpointError, InputError
from ..files.reading import open_safetensors
from .hooks import BeforeLLM

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Learned:
    """
    part     "selector", "router": the name of its file, and of its format
    options  of its training, which it is of no use without
    tensors  by name
    """

    part: str
    options: Mapping[str, str]
    tensors: Tensors


@singledispatch
def learned(sampler: BeforeLLM | None) -> Learned | None:
    """What a sampler has learned; None where that is nothing. Raises InputError for what could not be read again."""
    if sampler is None or next(sampler.parameters(), None) is None:
        return None
    raise InputError(
        f"before_llm: expected a sampler whose weights have a file, or none that has weights, got {type(sampler).__name__}: "
        "set_sampler('none') saves the model without it"
    )


def save_learned(sampler: BeforeLLM | None, folder: Path) -> str | None:
    """Write what a sampler has learned into a folder. Returns the file's name, or None where it has learned nothing.

    Equal weights give equal bytes. Raises InputError for what could not be read again, and OSError.
    """
    found = learned(sampler)
    if found is None:
        return None
    write_learned(folder / f"{found.part}.safetensors", found)
    return f"{found.part}.safetensors"


def write_learned(file: Path, found: Learned) -> None:
    tensors = {name: value.detach().cpu().contiguous() for name, value in found.tensors.items()}
    for name, value in tensors.items():
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise InputError(f"{found.part}.{name}: expected finite values, as {value.dtype}, got others")
    content = serialise(tensors, {"format": f"minifocus-{found.part}", **found.options})
    file.write_bytes(_in_order(content))


def read_learned(file: Path, part: str) -> tuple[dict[str, str], Tensors]:
    """The options and the tensors of such a file. Raises CheckpointError."""
    with open_safetensors(file) as stored:
        metadata = stored.metadata() or {}
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (not a mapping)
    expected = f"minifocus-{part}"
    if metadata.get("format") != expected:
        raise CheckpointError(f"{file}: metadata: expected format={expected}, got {shown(metadata.get('format'))}")
    return metadata, tensors


def check_tensors(file: Path, tensors: Tensors, expected: Mapping[str, torch.Tensor]) -> None:
    """Whether a file has the `expected` names and shapes, and finite values. Raises CheckpointError."""
    wanted, found = ({name: tuple(value.shape) for name, value in of.items()} for of in (expected, tensors))
    if found != wanted:
        wrong = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))[:10]
        there, here = ({name: of[name] for name in wrong if name in of} for of in (wanted, found))
        raise CheckpointError(f"{file}: expected tensors {there}, found {shown(here)}")
    for name, value in tensors.items():
        if not value.is_floating_point() or not bool(value.float().isfinite().all()):
            raise CheckpointError(f"{file}: {name}: expected finite floating-point values, got {value.dtype}")


def _in_order(content: bytes) -> bytes:
    """The same safetensors file with its header's keys in order: the library writes metadata in a random one."""
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:begin]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # as the library aligns the values
    return len(header).to_bytes(8, "little") + header + content[begin:]
