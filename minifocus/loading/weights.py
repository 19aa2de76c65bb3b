"""Loading safetensors strictly, and saving them. Every key, shape and dtype is checked before a model is made.

Checkpoints of one model come with five sets of names (`RENAMES`). The index is only used as a list of the shards: which tensors
there are is read from the shards themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from ..arguments import brief, shown
from ..errors import CheckpointError, InputError
from ..files.aligned import write_aligned
from ..files.reading import open_safetensors, present, read_json, regular
from ..quantized import QuantizedLinear, aligned, exchange
from .config import Config, describe_parts
from .finite import checking, is_finite
from .json_fields import JsonFields
from .model_folder import CONFIG

# Prefixes of names on disk → this package's, which are those that transformers 5 saves. The first match wins.
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
IGNORED = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq)$")  # buffers that older versions of transformers saved
HEAD, EMBEDDINGS = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
LAYERS = "language_model.model.layers."
STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_QUANTIZED_DTYPES = {"I8": torch.int8, "U8": torch.uint8, "BF16": torch.bfloat16}

Progress = Callable[[int, int], None]
Places = dict[str, tuple[slice, ...]]  # of the parts that are a process's own, in the stored tensors of these names


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: its place, shape and dtype."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


def canonical_name(key: str) -> str:
    """A tensor's name on disk → its name in this package."""
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
    return files_of_index(index)


def files_of_index(index: Path) -> list[Path]:
    """The files that an index beside them lists; see `shard_files`."""
    fields, folder = JsonFields.of_file(index), index.parent
    weight_map = fields.get("weight_map")
    valid = isinstance(weight_map, dict) and bool(weight_map)
    fields.check("weight_map", valid, "an object from tensor names to files")
    files = []
    for name in sorted({_file_name(value, fields, folder) for value in weight_map.values()}):
        if not present(folder / name):
            raise CheckpointError(f"{folder / name}: listed in {index.name} but not there")
        files.append(regular(folder / name))
    return files


def _file_name(value: object, index: JsonFields, folder: Path) -> str:
    """A file name out of a weight_map. It may hold no separator of any system, and may not be "." or ".."."""
    if not isinstance(value, str) or value in ("", ".", "..") or any(c in value for c in "/\\:\0"):
        raise index.error("weight_map", f"names of files in {folder}", f"{shown(value)}, which is none")
    return value


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint, by its name in this package. No tensor data is read."""
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
    """Compare the numbers of layers before a model is made, so that a wrong number cannot make a billion layers."""
    for prefix, key, expected in (
        (LAYERS, "text_config.num_hidden_layers", config.text.num_hidden_layers),
        ("vision_tower.encoder.layers.", "vision_config.num_hidden_layers", config.vision.num_hidden_layers),
    ):
        numbers = {name[len(prefix) :].partition(".")[0] for name in found if name.startswith(prefix)}
        if len(numbers) != expected:
            raise CheckpointError(
                f"{folder / 'config.json'}: {key}: {expected} layers, but the weights hold {len(numbers)} ({prefix}*)"
            )


def check_names_and_shapes(
    found: dict[str, StoredTensor],
    expected: dict[str, tuple[int, ...]],
    folder: Path,
    quantized: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Raise one error that lists all missing and unexpected tensors, and those of a wrong shape or dtype.

    `quantized` are the dtypes of a quantised model's own tensors, which have to be of no other.
    """
    problems = _mismatches({found[n].key if n not in expected else n: found[n].shape for n in found}, expected)
    exact = quantized or {}
    others = {n: v for n, v in sorted(found.items()) if n in expected and n not in exact}
    mistyped = [f"{n} ({v.dtype})" for n, v in others.items() if v.dtype not in STORED_DTYPES]
    if mistyped:
        problems.append(f"not of dtype {', '.join(STORED_DTYPES)} (quantised?): {_listing(mistyped)}")
    mistyped = [
        f"{n}: expected {str(dtype).removeprefix('torch.')}, found {found[n].dtype}"
        for n, dtype in sorted(exact.items())
        if n in found and _QUANTIZED_DTYPES.get(found[n].dtype) != dtype
    ]
    if mistyped:
        problems.append(f"wrong dtype: {_listing(mistyped)}")
    if problems:
        raise CheckpointError(f"{folder}: the weights do not fit config.json\n  " + "\n  ".join(problems))


def _mismatches(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    problems = []
    missing = sorted(expected.keys() - found.keys())
    if missing:
        problems.append(f"missing: {_listing(missing)}")
    unexpected = sorted(found.keys() - expected.keys())
    if unexpected:
        problems.append(f"unexpected: {_listing(unexpected)}")
    misshapen = [
        f"{n}: expected {expected[n]}, found {shown(found[n])}"
        for n in sorted(expected.keys() & found.keys())
        if expected[n] != found[n]
    ]
    if misshapen:
        problems.append(f"wrong shape: {_listing(misshapen)}")
    return problems


def _listing(names: list[str], limit: int = 20) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(brief, names[:limit])) + more


def map_tensors(
    found: dict[str, StoredTensor], device: torch.device, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Those tensors that are on `device` and in `dtype` as they are stored: mapped into memory, and not read yet."""
    as_it_is = {name for name, one in STORED_DTYPES.items() if one == dtype and device.type == "cpu"}
    own = {name: tensor for name, tensor in found.items() if tensor.dtype in as_it_is}
    mapped: dict[str, torch.Tensor] = {}
    for file in sorted({tensor.file for tensor in own.values()}):
        with open_safetensors(file) as stored:
            mapped |= {n: stored.get_tensor(tensor.key) for n, tensor in own.items() if tensor.file == file}
    return mapped


def convert_tensors(
    found: dict[str, StoredTensor],
    device: torch.device,
    dtype: torch.dtype,
    check_finite: bool,
    read: Callable[[int], None],
    quantized: Mapping[str, torch.dtype],
    quantize: Mapping[str, QuantizedLinear],
    places: Places,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each name and tensor, on `device` and in `dtype`; `read` is told its bytes.

    Matrices, kernels and embeddings that float16 is too narrow for (`_vanishes`) are refused. So are NaN and infinity, with
    `check_finite`. Tensors that `quantized` names are taken as they are. Weights that `quantize` names are read one by one, and
    come as what their layer holds instead. Of those that `places` names only that part is read.
    """
    for file in sorted({tensor.file for tensor in found.values()}):
        with open_safetensors(file) as stored:
            for name, tensor in found.items():
                if tensor.file != file:
                    continue
                if name in quantize:
                    parts = _quantized(tensor, quantize[name])
                elif name in quantized:
                    parts = {"": aligned(stored.get_tensor(tensor.key))}
                else:
                    place = places.get(name)
                    value = stored.get_tensor(tensor.key) if place is None else stored.get_slice(tensor.key)[place]
                    parts = {"": _converted(value, tensor, device, dtype, check_finite)}
                read(_num_bytes(tensor))
                for suffix, value in parts.items():
                    yield name + suffix, value.to(device)


def _converted(
    whole: torch.Tensor, stored: StoredTensor, device: torch.device, dtype: torch.dtype, check_finite: bool
) -> torch.Tensor:
    value = whole.to(device=device, dtype=dtype)
    if dtype == torch.float16 and whole.dtype != dtype and _vanishes(whole, value):
        raise CheckpointError(
            f"{stored.file}: {brief(stored.key)}: its values are too small for {dtype}: expected dtype bfloat16 or float32"
        )
    if check_finite and not is_finite(value):
        raise _not_finite(stored, dtype)
    return value


def _quantized(stored: StoredTensor, layer: QuantizedLinear) -> dict[str, torch.Tensor]:
    """What the layer holds in place of a floating-point weight, by what follows the weight's name.

    The file is opened anew: what is read of it stays in memory for as long as anything else out of the same opening.
    """
    with open_safetensors(stored.file) as file:
        weight, scale = layer.quantize(file.get_tensor(stored.key))
    if not layer.sound(scale):
        raise CheckpointError(
            f"{stored.file}: {brief(stored.key)}: holds NaN or infinite values, or such as bfloat16 cannot hold"
        )
    return {"": weight, "_scale": scale}


def _not_finite(tensor: StoredTensor, dtype: torch.dtype | None) -> CheckpointError:
    return CheckpointError(f"{tensor.file}: {brief(tensor.key)}: holds NaN or infinite values (as {dtype})")


def _num_bytes(tensor: StoredTensor) -> int:
    count = 1
    for side in tensor.shape:
        count *= side
    return count * {"F32": 4, "I8": 1, "U8": 1}.get(tensor.dtype, 2)


def _vanishes(whole: torch.Tensor, half: torch.Tensor) -> bool:
    """Whether float16 takes more than a tenth of the magnitude of a matrix, of any larger tensor, or of embeddings.

    Below 2⁻¹⁴ float16 has steps of 2⁻²⁴, so that it is off by 2⁻²⁵ at most: one pass over memory tells that nearly every
    tensor is far from it. Vectors may vanish: a bias of 1e-8 is as good as none.
    """
    if whole.dim() < 2:
        return False
    magnitude = _magnitude(whole)
    if not magnitude < 10 * 2**-25 * whole.numel():
        return False
    lost = whole.float() - half.to(whole.device, torch.float32)
    return _magnitude(lost) > magnitude / 10


def _magnitude(value: torch.Tensor) -> float:
    """The sum of all absolute values.

    In parts, because on the CPU a sum in float32 begins with a copy in float32, which for 128,000 embeddings takes 2 GB.
    """
    parts = value.flatten().split(2**22)
    return sum(float(torch.linalg.vector_norm(part, 1, dtype=torch.float32)) for part in parts)


class _WithoutInitialisation(TorchFunctionMode):
    """Modules that are made inside the block get no initial values: on the meta device, that would import for over a second.

    It acts on the thread that enters it. Other threads may make modules meanwhile.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def without_values(build: Callable[[], nn.Module]) -> nn.Module:
    """The model that `build` makes, on the meta device."""
    with torch.device("meta"), _WithoutInitialisation():
        return build()


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@contextmanager
def open_weights(
    folder: Path,
    config: Config,
    device: torch.device,
    dtype: torch.dtype | None,
    check_finite: bool = True,
    progress: Progress | None = None,
    quantize: bool = False,
    share: Callable[[nn.Module], Places] | None = None,
) -> Iterator[Callable[[Callable[[], nn.Module]], nn.Module]]:
    """Gives a function that makes a model by the one that it is given (on the meta device), with the folder's weights.

    `dtype` None takes config.json's, or else that of the stored embeddings. Where `config.quantized` says so, the decoder's
    weights are quantised: those of the folder already are, or have to be (`quantize`). From here to the model's end a thread
    checks the weights that stay as they are stored. `share` leaves of the model, which is still on the meta device, the part
    that this process holds, and says which that is; nothing else of those tensors is read, or checked. Raises CheckpointError
    with every mismatch in one message; nothing half-loaded or unchecked is ever returned.
    """
    found = read_headers(folder)
    check_layer_counts(found, config, folder)
    if dtype is None:
        dtype = config.dtype or (STORED_DTYPES.get(found[EMBEDDINGS].dtype) if EMBEDDINGS in found else None)
    decoder = (LAYERS, HEAD)  # what may be quantised or shared, and is not checked as it is
    whole = config.quantized is None and share is None
    plain = {n: one for n, one in found.items() if whole or not n.startswith(decoder)}
    mapped = map_tensors(plain, device, dtype)
    total, done = sum(_num_bytes(tensor) for tensor in found.values()), 0

    def read(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, total)

    with checking(mapped.values() if check_finite else ()) as all_finite:

        def make(build: Callable[[], nn.Module]) -> nn.Module:
            model = without_values(build)
            layers = _check_fit(found, model, config, folder, quantize)
            places = {} if share is None else share(model)
            assert dtype is not None  # the embeddings are there, and in a dtype that is known
            rest = {name: tensor for name, tensor in found.items() if name not in mapped}
            new = {f"{name}.weight": layer for name, layer in layers.items()} if quantize else {}
            state = mapped | dict(
                convert_tensors(rest, device, dtype, check_finite, read, quantized_dtypes(layers), new, places)
            )
            for name, layer in layers.items() if check_finite else ():
                if not layer.sound(state[f"{name}.weight_scale"]):
                    raise CheckpointError(
                        f"{folder}: {name}.weight_scale: expected finite scales above 0 and finite zeros"
                    )
            tied = state[EMBEDDINGS][places.get(HEAD, ...)] if config.tie_word_embeddings else None
            _fill(model, state, tied)
            if not all_finite(read):
                changed = CheckpointError(f"{folder}: its files were changed while they were read: load it again")
                raise next((_not_finite(found[n], dtype) for n, v in mapped.items() if not is_finite(v)), changed)
            if not check_finite:
                read(total - done)
            if tied is not None and not _same_values(state[HEAD], tied):
                raise CheckpointError(
                    f"{folder / 'config.json'}: tie_word_embeddings is true, but {found[HEAD].key} differs from the embeddings"
                )
            if layers:
                model.requires_grad_(False)
            return model.eval()

        yield make


def _check_fit(
    found: dict[str, StoredTensor], model: nn.Module, config: Config, folder: Path, quantize: bool
) -> dict[str, QuantizedLinear]:
    """Compare what is stored with the model, whose layers become those of `config.quantized`; these, by name."""
    expected = shapes_of(model)
    layers = exchange(model, config.quantized, config.tie_word_embeddings)
    if layers and not quantize:
        expected = shapes_of(model)
    if config.tie_word_embeddings and HEAD not in found:
        del expected[HEAD]
    check_names_and_shapes(found, expected, folder, None if quantize else quantized_dtypes(layers))
    return layers


def _fill(model: nn.Module, state: dict[str, torch.Tensor], tied: torch.Tensor | None) -> None:
    """Put `state` in the place of the model's values, without a copy. `tied`: the embeddings, or a part, that are its head."""
    if tied is not None:
        state.setdefault(HEAD, tied)
    model.load_state_dict(state, strict=True, assign=True)
    if tied is not None and tied.shape == state[EMBEDDINGS].shape:
        model.get_submodule("language_model.lm_head").weight = model.get_parameter(EMBEDDINGS)


def quantized_dtypes(layers: Mapping[str, QuantizedLinear]) -> dict[str, torch.dtype]:
    """The dtypes of what quantised layers hold beside their bias, by the tensors' names in the model."""
    return {f"{name}.{key}": value.dtype for name, layer in layers.items() for key, value in layer.named_buffers()}


def check_storable(
    state: dict[str, torch.Tensor],
    expected: dict[str, tuple[int, ...]],
    quantized: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Raise one InputError for tensors that cannot be written, or that `load` would not read again."""
    problems = _mismatches({n: tuple(v.shape) for n, v in state.items()}, expected)
    dtypes, exact = (*STORED_DTYPES.values(), torch.float64), quantized or {}
    unstored = [
        f"{name} ({value.dtype}, {value.layout}, on {value.device})"
        for name, value in state.items()
        if value.dtype not in ((exact[name],) if name in exact else dtypes)
        or value.layout != torch.strided
        or value.is_meta
    ]
    if unstored:
        stored = ", ".join(STORED_DTYPES) + (" (quantised weights: as they were loaded)" if exact else "")
        problems.append(f"not dense values of dtype {stored}: {_listing(unstored)}")
    if problems:
        raise InputError(
            "the model does not fit its config.json, so that no folder would load\n  " + "\n  ".join(problems)
        )


def save_model(
    state: dict[str, torch.Tensor],
    companions: Mapping[str, bytes | CheckpointError],
    folder: Path,
    config: Config,
    check_finite: bool,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model into an empty folder in Hugging Face's layout: `state`, by this package's names, and its other files.

    The names are those of a fresh `save_pretrained`, so transformers loads it as well. Each tensor is stored in its own
    dtype, float64 as float32 where that loses nothing; config.json names the embeddings'. It says of the projector what `config`
    does. A tied head is left out; one that
    is tied no more is written, and config.json says so. More than `shard_bytes` become several files with an index. Raises
    CheckpointError for a companion that could not be read, InputError for values that `load` would refuse, OSError
    and SafetensorError where `folder` cannot be written.
    """
    for name, content in companions.items():
        if isinstance(content, CheckpointError):
            raise content
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    members, tied = read_json(folder / CONFIG), config.tie_word_embeddings
    dtype = _narrow(state[EMBEDDINGS].dtype)
    changed = _set_dtype(members, str(dtype).removeprefix("torch."))
    changed = describe_parts(members, config) or changed
    if tied and not _same_values(state[HEAD], state[EMBEDDINGS]):
        tied = False
        for section in (members, members.get("text_config") or {}):
            if "tie_word_embeddings" in section or section is members:
                section["tie_word_embeddings"], changed = False, True
    if changed:
        _write_json(folder / CONFIG, members)

    names = [name for name in state if not (tied and name == HEAD)]
    shards: list[list[str]] = [[]]
    size = total = 0
    for name in names:
        num_bytes = state[name].numel() * _narrow(state[name].dtype).itemsize
        if size and size + num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + num_bytes, total + num_bytes
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    else:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    for file, shard in zip(files, shards, strict=True):
        tensors = {name: _stored(name, state[name]) for name in shard}
        if check_finite:
            for name, value in tensors.items():
                if value.is_floating_point() and not is_finite(value.to(dtype)):
                    raise InputError(
                        f"{name}: holds NaN or infinite values (as {dtype}), which `load` refuses: expected finite ones, or "
                        "check_finite=False"
                    )
        write = write_aligned if config.quantized else save_file
        write(_apart(tensors), folder / file, metadata={"format": "pt"})
    for file in files:
        (folder / file).chmod((folder / CONFIG).stat().st_mode)  # the library makes files that only the user may read


def _write_json(file: Path, fields: dict[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _narrow(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a tensor is stored in: float32 for float64, which `load` does not read."""
    return torch.float32 if dtype == torch.float64 else dtype


def _stored(name: str, value: torch.Tensor) -> torch.Tensor:
    """A tensor as it is stored: contiguous, on the CPU, in the dtype of `_narrow`. One that processes share is gathered."""
    if hasattr(value, "full_tensor"):  # a DTensor, whose class takes a while to import
        value = value.full_tensor()
    stored = value.detach().to("cpu", _narrow(value.dtype)).contiguous()
    if stored.dtype != value.dtype and not _same_values(stored.to(value.dtype), value.detach().cpu()):
        raise InputError(
            f"{name}: holds float64 values that are none of float32, the widest dtype of a checkpoint: expected "
            "model.float(), which rounds them, before save"
        )
    return stored


def _same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same, NaN included."""
    if a is b or a.shape != b.shape or a.dtype != b.dtype:
        return a is b
    b = b.to(a.device)
    return torch.equal(a, b) or torch.allclose(a, b, 0, 0, equal_nan=True)


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, but those that share memory with another are copied: safetensors refuses to write them."""
    found, end = dict(tensors), 0
    for name, value in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        if value.data_ptr() < end:
            found[name] = value.clone()
        end = max(end, value.data_ptr() + value.nbytes)
    return found


def _set_dtype(config: dict[str, Any], dtype: str) -> bool:
    """Set every dtype that a config.json names to `dtype`. Returns whether that changed anything."""
    changed = False
    for section in (config, config.get("text_config") or {}, config.get("vision_config") or {}):
        for key in ("dtype", "torch_dtype"):
            if section.get(key) not in (None, dtype):
                section[key], changed = dtype, True
    return changed
