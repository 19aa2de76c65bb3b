"""The file of AVG-LLaVA's learned router, router.safetensors: its weights by the public code's names, and its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..arguments import shown
from ..errors import CheckpointError, InputError
from ..loading.config import DTYPES, Config
from ..samplers.learned_file import Learned, check_tensors, learned, read_learned
from .router import Router
from .sampler import AVGLLaVA, RouterOptions, new_router


def load_router(file: Path, config: Config, given: Mapping[str, Any]) -> tuple[Router, RouterOptions]:
    """A trained router and the options that it was trained with; `given` ones may repeat but not contradict those.

    The weights keep the dtype that they are stored in. Raises CheckpointError and InputError.
    """
    metadata, tensors = read_learned(file, "router")
    try:
        trained = RouterOptions(
            granularities=tuple(int(tokens) for tokens in metadata["granularities"].split(",")),
            filtered_text=int(metadata["filtered_text"]),
            attention=metadata["attention"],  # type: ignore[arg-type]
            text=metadata["text"],  # type: ignore[arg-type]
            crop=metadata["crop"],  # type: ignore[arg-type]
        )
        trained.of_grid(config)
    except InputError as error:
        raise CheckpointError(f"{file}: metadata: {error}") from error
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{file}: metadata: expected granularities, filtered_text, attention, text and crop, got {shown(metadata)}"
        ) from error
    wanted = RouterOptions(**given)
    for name, value in asdict(trained).items():
        if given.get(name) is not None and getattr(wanted, name) != value:
            raise InputError(f"{name}: the router in {file} was trained with {value!r}, got {getattr(wanted, name)!r}")
    with torch.random.fork_rng(devices=[]):  # its first values are drawn, and replaced
        router = new_router(trained, config)
    check_tensors(file, tensors, router.state_dict())
    if len(found := {value.dtype for value in tensors.values()}) > 1 or not found <= set(DTYPES.values()):
        raise CheckpointError(
            f"{file}: expected all in one of {', '.join(DTYPES)}, got {shown(sorted(map(str, found)))}"
        )
    router.load_state_dict(tensors, assign=True)
    return router, trained


@learned.register
def _of_sampler(sampler: AVGLLaVA) -> Learned | None:
    if sampler.router is None:
        return None
    options = {name: str(value) for name, value in asdict(sampler.options).items()}
    options["granularities"] = ",".join(map(str, sampler.granularities))
    return Learned("router", options, dict(sampler.router.state_dict()))
