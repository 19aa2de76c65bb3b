"""A digest that says which model a run began from. Folders of equal content have equal digests, however they are written."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..files.reading import read_bytes
from ..loading.model_folder import LEARNED, WEIGHTS, own_files
from ..loading.weights import read_headers


def digest_of_model(folder: Path, blocks: int = 1024, size: int = 4096) -> str:
    """The digest of a model folder's own files: JSON by its values, tensors by their names, dtypes, shapes and values.

    Of the values, about `blocks` blocks of `size` bytes are read, evenly spread, and each tensor's ends. Neither the
    formatting of JSON counts, nor the files and the order in which tensors are stored, nor other files in the folder. Raises
    CheckpointError.
    """
    digest = hashlib.sha256()
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}

        def open_once(file: Path) -> Any:
            if file not in opened:
                opened[file] = stack.enter_context(safe_open(file, framework="pt"))
            return opened[file]

        try:
            # The files are mapped: only those bytes of a tensor that are digested are read.
            tensors = {name: open_once(t.file).get_tensor(t.key) for name, t in read_headers(folder).items()}
            for name in own_files(folder):
                if name in LEARNED:
                    part, stored = name.partition(".")[0], open_once(folder / name)
                    tensors |= {f"{part} {key}": stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
                    content = json.dumps(stored.metadata(), sort_keys=True).encode()
                elif WEIGHTS.fullmatch(name):
                    continue
                else:
                    content = _values(name, read_bytes(folder / name))
                digest.update(f"{name} {len(content)} ".encode() + content)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: cannot be read: {error}") from error
        stride = max(size, -(-sum(value.nbytes for value in tensors.values()) // blocks))
        for name, value in sorted(tensors.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            values = value.flatten().view(torch.uint8)
            for place in (*range(0, len(values), stride), max(0, len(values) - size)):
                digest.update(values[place : place + size].numpy().tobytes())
    return digest.hexdigest()


def _values(name: str, content: bytes) -> bytes:
    """A file's content. JSON is written anew, so that its formatting does not count."""
    if name.endswith(".json"):
        try:
            return json.dumps(json.loads(content), sort_keys=True).encode()
        except (ValueError, RecursionError):  # not JSON after all: its bytes count
            pass
    return content
