"""A folder of the original LLaVA repository, of AVG-LLaVA or of LLaVA-STF → a folder that `minifocus.load` takes.

Everything but the values themselves is checked before anything is written. Values stay on the disk until they are: the memory
that is needed is for one embedding matrix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .. import arguments
from ..arguments import brief
from ..errors import CheckpointError, InputError
from ..files.reading import FOLDER, kind, named, present, read_bytes
from ..inputs.processor import Processor
from ..loading.config import Config, VisionConfig, load_config, read_config
from ..loading.json_fields import JsonFields
from ..loading.model_folder import CONFIG, replacing
from ..loading.weights import (
    EMBEDDINGS,
    HEAD,
    StoredTensor,
    check_names_and_shapes,
    read_headers,
    save_model,
    shapes_of,
    without_values,
)
from ..model import LlavaNetwork
from ..samplers.learned_file import Learned, write_learned
from .config import OriginalConfig, check_tower, known_tower, read_original, read_tower
from .names import FUSION, TOWER, fused_layers, fusion_options, original_name
from .pictures import picture_settings
from .router import HEADS, IN_CHECKPOINT, router_options, router_shapes
from .stored import read_names, values_of
from .template import NAMES, chat_template, trained_with
from .tokenizer import add_image_token

_GENERATION = "generation_config.json"


def convert(
    original: str | PathLike[str],
    folder: str | PathLike[str],
    vision_tower: str | PathLike[str] | None = None,
    template: str | None = None,
    *,
    check_finite: bool = True,
    shard_bytes: int = 5_000_000_000,
) -> str:
    """Write the model in `original` into `folder`, in the way of `Llava.save`. Returns what it is, in words.

    vision_tower  a folder of a CLIPVisionModel or CLIPModel in Hugging Face's layout. Its weights are taken where `original`
                  has none of the tower, its config.json and preprocessor_config.json in any case.
    template      what the model was trained with, one of `template.NAMES`; None: what its vocabulary and decoder suggest
    check_finite  refuse weights with NaN or infinity
    shard_bytes   the most bytes of tensors in a file

    Raises CheckpointError for what is wrong in `original` or `vision_tower`, InputError for a bad argument and a `folder` that
    cannot be written. Then `folder` is as it was.
    """
    source, target = arguments.path("original", original), arguments.path("folder", folder)
    tower = None if vision_tower is None else arguments.path("vision_tower", vision_tower)
    for place in (source, *([] if tower is None else [tower])):
        if kind(place) != FOLDER:
            raise CheckpointError(f"{named(place)}: expected a folder, found {kind(place)}")
        if kind(target) == FOLDER and target.resolve() == place.resolve():
            raise InputError(f"folder: expected another than {named(place)}, whose files the new ones would replace")
    if template is not None:
        arguments.choice("template", template, NAMES)

    config = read_original(source)
    vision = _vision(config, tower)
    found = read_names(source)
    layers, projector = _projector(config, vision, found)
    plain = read_config(
        JsonFields(config.members(vision, layers, projector, config.text.vocab_size, 0), config.fields.where), source
    )
    own_tower = any(name.startswith(TOWER) for name in found)
    towers = {} if own_tower else _read_tower_names(config, tower)
    _check_layers(found, "model.layers.", config.text.num_hidden_layers, source)
    _check_layers(found if own_tower else towers, f"{TOWER}encoder.layers.", vision.num_hidden_layers, tower or source)
    shapes = _shapes(plain)
    model, router = _match(config, shapes, found, source, own_tower)
    if not own_tower:
        assert tower is not None
        expected = {original_name(name): shape for name, shape in shapes.items() if name.startswith("vision_tower.")}
        check_names_and_shapes(towers, expected, tower)
        model |= {name: towers[original_name(name)] for name in shapes if name.startswith("vision_tower.")}
    pictures = picture_settings(config, vision, tower)
    try:
        with replacing(target) as fresh:
            tokens = add_image_token(source, fresh)
            template = template or trained_with(tokens.tokenizer, config.text.model_type, named(source))
            vocab_size = max(config.text.vocab_size, tokens.image + 1)
            members = config.members(vision, layers, projector, vocab_size, tokens.image)
            new = read_config(JsonFields(members, config.fields.where), source)
            companions = {
                CONFIG: _written(members),
                "preprocessor_config.json": _written(pictures),
                "chat_template.jinja": chat_template(template, tokens.gap).encode(),
                **tokens.files,
            }
            if present(source / _GENERATION):
                companions[_GENERATION] = read_bytes(source / _GENERATION)
            try:
                save_model(_state(model, new, source), companions, fresh, new, check_finite, shard_bytes)
            except InputError as error:
                raise CheckpointError(f"{named(source)}: {error}") from error
            if router:
                _write_router(router, config, fresh)
            _check(fresh)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{named(target)}: expected a folder that can be written: {error}") from error
    name = "AVG-LLaVA" if router else "LLaVA-STF" if projector else "LLaVA-NeXT" if config.anyres else "LLaVA-1.5"
    return f"{name}, asked in the template {template}"


def _vision(config: OriginalConfig, tower: Path | None) -> VisionConfig:
    """The tower's sizes: of its own folder, or else those that its name stands for."""
    vision = known_tower(config) if tower is None else read_tower(tower)
    if vision is None:
        raise config.fields.error(
            "mm_vision_tower", "openai/clip-vit-large-patch14-336, or --vision-tower with a folder of it"
        )
    check_tower(config, vision)
    return vision


def _projector(
    config: OriginalConfig, vision: VisionConfig, found: Mapping[str, StoredTensor]
) -> tuple[list[int], dict[str, Any] | None]:
    """`vision_feature_layer` and `projector` of the new config.json. Weights alone tell LLaVA-STF from LLaVA-1.5."""
    if not any(name.startswith(FUSION) for name in found):
        return [config.select_layer], None
    fields = config.fields
    fields.check("image_aspect_ratio", not config.anyres, f"square or pad, beside weights of LLaVA-STF ({FUSION}*)")
    fields.check("mm_vision_select_feature", not config.keep_cls, f"'patch', beside weights of LLaVA-STF ({FUSION}*)")
    layers = fused_layers(config.select_layer, vision.num_hidden_layers)
    return layers, fusion_options(found, vision.hidden_size, vision.grid, layers)


def _read_tower_names(config: OriginalConfig, tower: Path | None) -> dict[str, StoredTensor]:
    """The tower's tensors in a folder of its own, by the names that they have in the original repositories' checkpoints."""
    if tower is None:
        raise CheckpointError(
            f"{config.fields.where}: mm_vision_tower: the weights hold no vision tower ({TOWER}*): expected --vision-tower "
            f"with a folder of {brief(config.tower)}"
        )
    found = read_names(tower)
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in found) else ""  # transformers 4, or 5
    return {TOWER + name[len(prefix) :]: tensor for name, tensor in found.items() if name.startswith(prefix)}


def _match(
    config: OriginalConfig,
    shapes: dict[str, tuple[int, ...]],
    found: dict[str, StoredTensor],
    source: Path,
    own_tower: bool,
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The model's tensors and the router's by their new names. One error lists all that is missing, unexpected or misshapen."""
    ours = {original_name(name): name for name in shapes if own_tower or not name.startswith("vision_tower.")}
    if config.tied and original_name(HEAD) not in found:
        del ours[original_name(HEAD)]
    routers: dict[str, tuple[int, ...]] = {}
    has_router = any(name.startswith(IN_CHECKPOINT) for name in found)
    if config.granularities and (config.routed or has_router):
        width = config.text.hidden_size
        config.fields.check("hidden_size", width % HEADS == 0, f"a multiple of the router's {HEADS} heads")
        routers = router_shapes(config.granularities, config.filtered_text, width)
    elif has_router:
        raise config.fields.error(
            "vis_token_granularity", f"AVG-LLaVA's, as the weights have a router ({IN_CHECKPOINT}*)"
        )
    expected = {theirs: shapes[name] for theirs, name in ours.items()}
    expected |= {IN_CHECKPOINT + name: shape for name, shape in routers.items()}
    check_names_and_shapes(found, expected, source)
    return {name: found[theirs] for theirs, name in ours.items()}, {n: found[IN_CHECKPOINT + n] for n in routers}


def _check_layers(found: Mapping[str, StoredTensor], prefix: str, expected: int, folder: Path) -> None:
    """Before a model is made, so that a wrong number cannot make a billion layers."""
    numbers = {name[len(prefix) :].partition(".")[0] for name in found if name.startswith(prefix)}
    if len(numbers) != expected:
        raise CheckpointError(
            f"{named(folder)}: {prefix}*: config.json has {expected} layers, the weights {len(numbers)}"
        )


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    return shapes_of(without_values(lambda: LlavaNetwork(config)))


def _state(model: dict[str, StoredTensor], new: Config, source: Path) -> dict[str, torch.Tensor]:
    """The new model's tensors. Embeddings and head get rows for the tokens that are new, which are never looked at: the mean."""
    state = values_of(model)
    tied = new.tie_word_embeddings
    if tied and HEAD in state and not torch.equal(state[HEAD], state[EMBEDDINGS]):
        raise CheckpointError(
            f"{named(source / CONFIG)}: tie_word_embeddings is true, but {original_name(HEAD)} differs from the embeddings"
        )
    for name in (EMBEDDINGS,) if tied else (EMBEDDINGS, HEAD):
        rows = state[name]
        mean = rows.mean(0, dtype=torch.float32).to(rows.dtype)
        more = new.text.vocab_size - len(rows)
        state[name] = torch.cat([rows, mean.expand(more, -1)]) if more else rows
    return state | ({HEAD: state[EMBEDDINGS]} if tied else {})


def _write_router(router: dict[str, StoredTensor], config: OriginalConfig, fresh: Path) -> None:
    values = {name: value.contiguous() for name, value in values_of(router).items()}
    for name, value in values.items():
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"{router[name].file}: {router[name].key}: holds NaN or infinite values")
    write_learned(fresh / "router.safetensors", Learned("router", router_options(config), values))


def _check(fresh: Path) -> None:
    """What `load` does with the new files, but for the values."""
    config = load_config(fresh)
    Processor.from_folder(fresh, config)
    expected = _shapes(config)
    found = read_headers(fresh)
    if config.tie_word_embeddings:
        expected = {name: shape for name, shape in expected.items() if name in found or name != HEAD}
    check_names_and_shapes(found, expected, fresh)


def _written(members: dict[str, Any]) -> bytes:
    return (json.dumps(members, indent=2) + "\n").encode()
