"""Writing a safetensors file whose values can be mapped into memory and used there by instructions that want them aligned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

ALIGNMENT = 64  # bytes: a cache line, and the widest of a processor's registers
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8", torch.uint8: "U8"}


def write_aligned(tensors: Mapping[str, torch.Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Write contiguous tensors of the CPU. Each begins at a multiple of `ALIGNMENT`, or of the largest power of 2 in its size.

    The library's own writer aligns to 8 bytes. Raises OSError.
    """

    def alignment(name: str) -> int:
        size = tensors[name].nbytes
        return min(size & -size, ALIGNMENT)

    header: dict[str, object] = {"__metadata__": dict(metadata)}
    names, offset = sorted(tensors, key=alignment, reverse=True), 0
    for name in names:
        value = tensors[name]
        places = [offset, offset := offset + value.nbytes]
        header[name] = {"dtype": _CODES[value.dtype], "shape": list(value.shape), "data_offsets": places}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with file.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            stream.write(tensors[name].flatten().view(torch.uint8).numpy().data)
