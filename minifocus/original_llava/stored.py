"""The tensors of a folder's weights, whatever their format: safetensors, or what `torch.save` wrote as pytorch_model.bin.

Either format in one file, or in several with an index. Values stay on the disk until they are used: both are mapped into
memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..arguments import brief, shown
from ..errors import CheckpointError
from ..files.reading import named, open_safetensors, present, regular
from ..loading.weights import IGNORED, STORED_DTYPES, StoredTensor, files_of_index, shard_files

_PICKLED, _PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_SPLIT = re.compile(r"adapter_model\..*|mm_projector\.bin|non_lora_trainables\.bin")
_CODES = {dtype: code for code, dtype in STORED_DTYPES.items()}


def weight_files(folder: Path) -> list[Path]:
    """safetensors where there are any, else pickled files. Raises CheckpointError."""
    if any(present(folder / name) for name in ("model.safetensors", "model.safetensors.index.json")):
        return shard_files(folder)
    if present(folder / _PICKLED):
        return [regular(folder / _PICKLED)]
    if present(folder / _PICKLED_INDEX):
        return files_of_index(folder / _PICKLED_INDEX)
    parts = sorted(file.name for file in folder.iterdir() if _SPLIT.fullmatch(file.name))
    hint = f" ({', '.join(parts)}: a part of a model alone, to be merged into the whole first)" if parts else ""
    raise CheckpointError(
        f"{named(folder)}: expected model.safetensors, {_PICKLED}, or an index of several, found none{hint}"
    )


def read_names(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor by its own name, but for buffers that older versions of transformers saved. No values are read."""
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        for tensor in _names_of(file):
            if IGNORED.search(tensor.key):
                continue
            if tensor.key in found:
                raise CheckpointError(f"{file}: {brief(tensor.key)}: is in {found[tensor.key].file.name} as well")
            found[tensor.key] = tensor
    return found


def _names_of(file: Path) -> Iterator[StoredTensor]:
    if file.suffix == ".safetensors":
        with open_safetensors(file) as stored:
            for key in stored.keys():  # noqa: SIM118 (not a mapping)
                piece = stored.get_slice(key)
                yield StoredTensor(file, key, tuple(piece.get_shape()), str(piece.get_dtype()))
    else:
        for key, value in _unpickled(file).items():
            yield StoredTensor(file, key, tuple(value.shape), _CODES.get(value.dtype, str(value.dtype)))


def values_of(tensors: dict[str, StoredTensor]) -> dict[str, torch.Tensor]:
    """The values under the same names, read as they are used."""
    values: dict[str, torch.Tensor] = {}
    for file in sorted({tensor.file for tensor in tensors.values()}):
        own = {name: tensor.key for name, tensor in tensors.items() if tensor.file == file}
        with _opened(file) as stored:
            values |= {name: stored(key) for name, key in own.items()}
    return {name: values[name] for name in tensors}


@contextmanager
def _opened(file: Path) -> Iterator[Callable[[str], torch.Tensor]]:
    if file.suffix == ".safetensors":
        with open_safetensors(file) as stored:
            yield stored.get_tensor
    else:
        yield _unpickled(file).__getitem__


def _unpickled(file: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(regular(file), map_location="cpu", mmap=True, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # pickle, zip and torch raise many kinds
        reason = brief(str(error).partition("\n")[0])
        raise CheckpointError(f"{named(file)}: not readable as tensors that torch.save wrote: {reason}") from error
    tensors = isinstance(content, dict) and all(
        isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
        for key, value in content.items()
    )
    if not tensors:
        raise CheckpointError(
            f"{named(file)}: expected names with dense tensors, found {shown(type(content).__name__)}"
        )
    return dict(content)
