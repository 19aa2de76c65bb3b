"""An exported package, a folder:

manifest.txt   what is in it, a line for each key (csrc/runtime/manifest.h), with versions and hashes
weights.bin    all weights once, each from a multiple of 64 bytes on
tokenizer.bin  the tokenizer's table
parts/         the compiled parts: parts.py
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ..arguments import shown
from ..constraints import Constraints
from ..errors import InputError
from ..files.reading import NOTHING, kind, named, present
from ..inputs.processor import Picture
from ..llama import rope_frequencies
from ..load import Llava
from ..samplers.text_guided import TextGuidedSampler
from ..samplers.vision_guided import VisionGuidedSampler
from ..version import __version__
from . import prompt_table, token_table
from .checking import check_parts
from .compiling import LEVELS, compile_part, default_level
from .parts import LAYERS, Part, parts_of
from .picture_settings import picture_settings
from .quantized_layers import exportable

FORMAT = 1  # csrc/runtime/package.cpp reads the same
ALIGNMENT = 64
MANIFEST, WEIGHTS, TOKENIZER = "manifest.txt", "weights.bin", "tokenizer.bin"
_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int8: "int8",
    torch.uint8: "uint8",
}

Lines = dict[str, list[object]]


def export(
    model: Llava,
    sampler: str,
    out: Path,
    pictures: list[Picture],
    level: str | None = None,
    told: Callable[[str], object] = lambda step: None,
) -> None:
    """Write a package of `model`, which was loaded on the CPU with `sampler`.

    pictures  what the compiled parts are checked with: they must compute what the model does, or nothing is written
    level     of the processors that the package is for, one of LEVELS; None: the highest that this one has
    told      called with each step before it begins

    A package that is there already is replaced. Raises InputError for a model, sampler or setting that the runtime does not have
    and for a folder that is something else, and CheckpointError for a tokenizer or template that it does not have.
    """
    level = default_level() if level is None else level
    if level not in LEVELS:
        raise InputError(f"cpu: expected one of {', '.join(LEVELS)}, got {shown(level)}")
    _check_model(model, sampler)
    if kind(out) != NOTHING and not present(out / MANIFEST):
        raise InputError(f"{named(out)}: expected no such folder, or a package that is to be replaced")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            fresh = Path(scratch) / "package"
            _write(model, sampler, fresh, pictures, level, told)
            if kind(out) != NOTHING:
                out.rename(Path(scratch) / "old")
            fresh.rename(out)
    except OSError as error:
        raise InputError(f"{named(out)}: expected a folder that can be written: {error}") from error


def _check_model(model: Llava, sampler: str) -> None:
    if sampler not in ("none", "text", "vision", "focus"):
        raise InputError(f"sampler: expected none, text, vision or focus, got {shown(sampler)}")
    if model.device.type != "cpu":
        raise InputError(f"device: expected a model on the CPU, for which packages are, got one on {model.device}")
    constraints, free = model.config.generation.constraints, Constraints()
    for name in Constraints.__dataclass_fields__:
        value = getattr(constraints, name)
        if value != getattr(free, name):
            raise InputError(
                f"{model.folder / 'generation_config.json'}: {name}: expected none, as the runtime has no constraints, "
                f"got {shown(value)}"
            )


def _write(
    model: Llava, sampler: str, folder: Path, pictures: list[Picture], level: str, told: Callable[[str], object]
) -> None:
    (folder / "parts").mkdir(parents=True)
    parts = parts_of(model)
    taken: dict[str, list[str]] = {}
    with torch.no_grad():
        for name, part in parts.items():
            told(f"compiling {name}")
            taken[name] = compile_part(exportable(part), name, folder / "parts", level)
        told("checking the parts against the model")
        check_parts(model, parts, taken, folder / "parts", pictures)
        told("writing the weights")
        weights = _write_weights(_weights(model, parts, taken), folder / WEIGHTS)
    token_table.write(model.processor.text_tokenizer, model.folder, folder / TOKENIZER)
    files = [TOKENIZER, *sorted(f"parts/{file.name}" for file in (folder / "parts").iterdir())]
    lines: Lines = {
        "format": [FORMAT],
        "minifocus": [__version__],
        "torch": [torch.__version__],
        "cpu": [level],
        "sampler": [sampler],
        "files": [*files],
        **{f"sha1.{file}": [_sha1(folder / file)] for file in (WEIGHTS, *files)},
        "parts": list(parts),
        **{f"part.{name}": [*names] for name, names in taken.items()},
        **_model_lines(model),
        **prompt_table.lines(model.processor),
        **picture_settings(model.image_processor, model.config),
        **weights,
    }
    text = "".join(" ".join([key, *map(_word, values)]) + "\n" for key, values in lines.items())
    (folder / MANIFEST).write_bytes(signed(text))


def signed(lines: str) -> bytes:
    """A manifest of these lines, with their hash behind them: a line that has changed is noticed."""
    content = lines.encode()
    return content + f"sha1.manifest {hashlib.sha1(content, usedforsecurity=False).hexdigest()}\n".encode()


def _model_lines(model: Llava) -> Lines:
    config, text = model.config, model.config.text
    lines: Lines = {
        "model.layers": [text.num_hidden_layers],
        "model.key_heads": [text.num_key_value_heads],
        "model.head_dim": [text.head_dim],
        "model.context": [text.max_position_embeddings],
        "model.patches": [config.vision.grid],
        "model.keep_cls": [config.keep_cls],
        "generation.max_new_tokens": [config.generation.max_new_tokens or 256],
    }
    if isinstance(model.before_llm, VisionGuidedSampler):
        lines["regions.window"] = [model.before_llm.options.window]
        lines["regions.thumbnail"] = [model.before_llm.options.thumbnail]
    if isinstance(model.inside_llm, TextGuidedSampler):
        options = model.inside_llm.options
        lines["guided.layer"], lines["guided.gamma"] = [model.inside_llm.layer], [options.gamma]
        lines["guided.text"] = [options.text]
        if options.keep is not None:
            lines["guided.keep"] = [options.keep]
    return lines


def _weights(model: Llava, parts: Mapping[str, Part], taken: Mapping[str, list[str]]) -> dict[str, torch.Tensor]:
    """What the parts take and what the runtime reads itself, by name."""
    text = model.config.text
    state = model.state_dict()
    names = ["language_model.model.embed_tokens.weight", *(["image_newline"] if model.config.anyres else [])]
    for part, own in taken.items():
        prefix = parts[part].prefix
        numbers = [f"{layer}." for layer in range(text.num_hidden_layers)] if prefix == LAYERS else [""]
        names += [prefix + number + name for number in numbers for name in own]
    found = {name: state[name] for name in dict.fromkeys(names)}
    return found | {"rope.frequencies": rope_frequencies(text.rope, text.head_dim, torch.device("cpu"))}


def _write_weights(weights: Mapping[str, torch.Tensor], file: Path) -> Lines:
    """Write them, those of one memory once, and return the manifest's lines."""
    lines: Lines = {"weights": [*weights]}
    places: dict[int, int] = {}
    with file.open("xb") as stream:
        for name, value in weights.items():
            if value.data_ptr() not in places:
                places[value.data_ptr()] = stream.tell()
                stream.write(value.detach().contiguous().flatten().view(torch.uint8).numpy().data)
                stream.write(bytes(-stream.tell() % ALIGNMENT))
            lines[f"weight.{name}"] = [_DTYPES[value.dtype], places[value.data_ptr()], *value.shape]
        lines["weights.size"] = [stream.tell()]
    return lines


def _sha1(file: Path) -> str:
    digest = hashlib.sha1(usedforsecurity=False)
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _word(value: object) -> str:
    word = str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, float) else str(value)
    assert word and not any(character.isspace() for character in word), f"{word!r} is not one word"
    return word
