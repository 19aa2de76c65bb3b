"""Strict loading of safetensors: every key accounted for, every shape and dtype checked, before a model exists; saving.

Checkpoints of the same model come with five sets of names (`RENAMES`); contents are taken from the shards themselves,
of which the index only gives the list.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from .arguments import shown
from .config import Config
from .errors import CheckpointError
from .files import brief, open_safetensors, present, read_json, regular

# Names on disk → this package's, which are those of a fresh `save_pretrained` of transformers 5. First match wins.
RENAMES = [
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower."),  # the original LLaVA repository
    ("model.vision_tower.vision_model.", "vision_tower."),  # transformers 4.52 to 4.57, in memory
    ("model.vision_tower.", "vision_tower."),  # transformers 5, in memory
    ("vision_tower.vision_model.", "vision_tower."),  # transformers 4, most of the hub
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
    ("model.language_model.", "language_model.model."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
]
IGNORED = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq)$")  # buffers that older versions wrote
HEAD, EMBEDDINGS = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: where it is and what it is."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


def canonical_name(key: str) -> str:
    for prefix, replacement in RENAMES:
        if key.startswith(prefix):
            return replacement + key[len(prefix) :]
    return key


def shard_files(folder: Path) -> list[Path]:
    """The checkpoint's files: model.safetensors, or what model.safetensors.index.json lists.

    A listed name is that of a file in the folder. The file may be a link, wherever that leads, as in a hub cache: whoever
    put it there owns the folder. A name that itself leads out of the folder is refused.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if present(single):
        return [regular(single)]
    if not present(index):
        others = sorted(p.name for p in folder.glob("*.bin"))
        hint = f" ({', '.join(others[:3])}: convert it to safetensors first)" if others else ""
        raise CheckpointError(f"{folder}: found neither {single.name} nor {index.name}{hint}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: weight_map: expected an object from tensor names to files, got {shown(weight_map)}"
        )
    files = []
    for name in sorted({_file_name(value, index) for value in weight_map.values()}):
        if not present(folder / name):
            raise CheckpointError(f"{folder / name}: listed in {index.name} but not there")
        files.append(regular(folder / name))
    return files


def _file_name(value: object, index: Path) -> str:
    """The plain file name that a weight_map lists; with a separator of any system, or one of the special names, it is none."""
    if not isinstance(value, str) or value in ("", ".", "..") or any(c in value for c in "/\\:\0"):
        raise CheckpointError(
            f"{index}: weight_map: expected names of files in {index.parent}, got {shown(value)}, which is none"
        )
    return value


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint by this package's name for it; no tensor data is read."""
    found: dict[str, StoredTensor] = {}
    for file in shard_files(folder):
        with open_safetensors(file) as stored:
            for key in stored.keys():  # noqa: SIM118 (not a mapping)
                if IGNORED.search(key):
                    continue
                piece = stored.get_slice(key)
                tensor = StoredTensor(file, key, tuple(piece.get_shape()), str(piece.get_dtype()))
                name = canonical_name(key)
                if name in found:
                    other = found[name]
                    raise CheckpointError(
                        f"{file}: {brief(key)}: the same tensor as {brief(other.key)} in {other.file.name}"
                    )
                found[name] = tensor
    return found


def check_layer_counts(found: dict[str, StoredTensor], config: Config, folder: Path) -> None:
    """Compare depths before a model is built, so that a wrong number cannot ask for a billion layers."""
    for prefix, key, expected in (
        ("language_model.model.layers.", "text_config.num_hidden_layers", config.text.num_hidden_layers),
        ("vision_tower.encoder.layers.", "vision_config.num_hidden_layers", config.vision.num_hidden_layers),
    ):
        numbers = {name[len(prefix) :].partition(".")[0] for name in found if name.startswith(prefix)}
        if len(numbers) != expected:
            raise CheckpointError(
                f"{folder / 'config.json'}: {key}: {expected} layers, but the weights hold {len(numbers)} ({prefix}*)"
            )


def check_names_and_shapes(found: dict[str, StoredTensor], expected: dict[str, tuple[int, ...]], folder: Path) -> None:
    """One error for all missing, unexpected, misshapen and wrongly typed tensors."""
    problems = []
    missing = sorted(expected.keys() - found.keys())
    if missing:
        problems.append(f"missing: {_listing(missing)}")
    unexpected = sorted(found.keys() - expected.keys())
    if unexpected:
        problems.append(f"unexpected: {_listing([found[name].key for name in unexpected])}")
    shared = sorted(expected.keys() & found.keys())
    misshapen = [
        f"{n}: expected {expected[n]}, found {shown(found[n].shape)}" for n in shared if expected[n] != found[n].shape
    ]
    if misshapen:
        problems.append(f"wrong shape: {_listing(misshapen)}")
    mistyped = [f"{n} ({found[n].dtype})" for n in shared if found[n].dtype not in STORED_DTYPES]
    if mistyped:
        problems.append(f"not of dtype {', '.join(STORED_DTYPES)} (quantised?): {_listing(mistyped)}")
    if problems:
        raise CheckpointError(f"{folder}: the weights do not fit config.json\n  " + "\n  ".join(problems))


def _listing(names: list[str], limit: int = 20) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(brief, names[:limit])) + more


def read_tensors(
    found: dict[str, StoredTensor],
    device: torch.device,
    dtype: torch.dtype,
    check_finite: bool,
    progress: Progress | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor with its name, on `device` and in `dtype`; NaN and infinity are refused unless told otherwise."""
    total = sum(_num_bytes(tensor) for tensor in found.values())
    done = 0
    for file in sorted({tensor.file for tensor in found.values()}):
        with open_safetensors(file) as stored:
            for name, tensor in found.items():
                if tensor.file != file:
                    continue
                value = stored.get_tensor(tensor.key).to(device=device, dtype=dtype)
                if check_finite and not _finite(value):
                    raise CheckpointError(f"{file}: {brief(tensor.key)}: holds NaN or infinite values (as {dtype})")
                done += _num_bytes(tensor)
                if progress is not None:
                    progress(done, total)
                yield name, value


def _num_bytes(tensor: StoredTensor) -> int:
    count = 1
    for side in tensor.shape:
        count *= side
    return count * (4 if tensor.dtype == "F32" else 2)


def _finite(value: torch.Tensor) -> bool:
    """A sum is finite only if all its terms are, and is the fastest pass over memory; one that overflowed is checked.

    In parts: on the CPU, a sum in float32 begins with a copy in float32, which of 128,000 embeddings takes 2 GB.
    """
    parts = value.flatten().split(2**22)
    return all(bool(part.sum(dtype=torch.float32).isfinite()) or bool(part.isfinite().all()) for part in parts)


class _WithoutInitialisation(TorchFunctionMode):
    """Modules made inside get no random values: on the meta device those cost more than a second of imports alone.

    It holds for the thread that enters it: others, which may be loading or making modules too, are not touched.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def load_model(
    build: Callable[[], nn.Module],
    config: Config,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    check_finite: bool = True,
    progress: Progress | None = None,
) -> nn.Module:
    """The model that `build` makes (on the meta device), with the folder's weights.

    `dtype` None takes config.json's, or else that of the stored embeddings. Raises CheckpointError with every mismatch in
    one message; nothing half-loaded is ever returned.
    """
    found = read_headers(folder)
    check_layer_counts(found, config, folder)
    with torch.device("meta"), _WithoutInitialisation():
        model = build()
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = config.tie_word_embeddings
    if tied and HEAD not in found:
        del expected[HEAD]
    check_names_and_shapes(found, expected, folder)

    dtype = dtype or config.dtype or STORED_DTYPES[found[EMBEDDINGS].dtype]
    state = dict(read_tensors(found, device, dtype, check_finite, progress))
    if tied:
        head = state.setdefault(HEAD, state[EMBEDDINGS])
        if head is not state[EMBEDDINGS] and not torch.equal(head, state[EMBEDDINGS]):
            raise CheckpointError(
                f"{folder / 'config.json'}: tie_word_embeddings is true, but {found[HEAD].key} differs from the embeddings"
            )
    model.load_state_dict(state, strict=True, assign=True)
    if tied:
        model.get_submodule("language_model.lm_head").weight = model.get_parameter(EMBEDDINGS)
    return model.eval()


# What holds weights: of these files, those that a save has not written are stale.
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
# What `save_model` takes over from the folder that a model came from, where it is there.
COMPANIONS = (
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)


def save_model(
    state: dict[str, torch.Tensor], source: Path, folder: Path, tied: bool, shard_bytes: int = 5_000_000_000
) -> None:
    """Write a folder in Hugging Face's layout: `state`, by this package's names, and the other files of `source`.

    The names are those of a fresh `save_pretrained`, so transformers loads it as well. Each tensor is stored in its own
    dtype; config.json names the embeddings'. A tied head is left out. More than `shard_bytes` become several files with an
    index. Weights that are there are replaced once the new ones are whole. Raises CheckpointError where `source` has no
    config.json, OSError and SafetensorError where `folder` cannot be written.
    """
    config = read_json(source / "config.json")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items() if not (tied and name == HEAD)}
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, value in tensors.items():
        if size and size + value.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    weights = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        weights = ["model.safetensors"]
    written = {name: folder / f"{name}.tmp" for name in weights}
    try:
        for name, shard in zip(weights, shards, strict=True):
            save_file(shard, written[name], metadata={"format": "pt"})
        texts = {}
        if len(shards) > 1:
            weight_map = {key: name for name, shard in zip(weights, shards, strict=True) for key in shard}
            total = sum(value.nbytes for value in tensors.values())
            texts["model.safetensors.index.json"] = {"metadata": {"total_size": total}, "weight_map": weight_map}
        if _set_dtype(config, str(state[EMBEDDINGS].dtype).removeprefix("torch.")):
            texts["config.json"] = config
        for name, fields in texts.items():
            written[name] = folder / f"{name}.tmp"
            written[name].write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        for name in COMPANIONS if source.resolve() != folder.resolve() else ():
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        for name, unfinished in written.items():
            unfinished.replace(folder / name)
    finally:
        for unfinished in written.values():
            unfinished.unlink(missing_ok=True)
    for old in folder.iterdir():
        if WEIGHTS.fullmatch(old.name) and old.name not in written:
            old.unlink()


def _set_dtype(config: dict[str, Any], dtype: str) -> bool:
    """Have a config.json name `dtype` wherever it names one; whether that changed anything."""
    changed = False
    for section in (config, config.get("text_config") or {}, config.get("vision_config") or {}):
        for key in ("dtype", "torch_dtype"):
            if section.get(key) not in (None, dtype):
                section[key], changed = dtype, True
    return changed
