"""The checkpoint of a run. A run that goes on from it ends in the weights of a run that was never interrupted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..arguments import shown, whole
from ..errors import InputError
from ..files.reading import present, regular
from ..files.writing import replace

CHECKPOINT = "checkpoint.pt"


def save_checkpoint(
    file: Path,
    trained: dict[str, nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    identity: dict[str, Any],
    steps: int,
    seconds: float,
    averages: dict[str, float],
) -> None:
    """Write the whole checkpoint or none: a run that is killed here leaves the one before. Raises InputError."""
    state = {
        "identity": identity,
        "steps": steps,
        "seconds": seconds,
        "averages": averages,
        "parameters": {name: p.detach() for name, p in trained.items()},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }

    def write(unfinished: Path) -> None:
        with unfinished.open("wb") as stream:
            try:
                torch.save(state, stream)
            except RuntimeError as error:  # raised by torch's writer because of the system's error
                if isinstance(error.__context__, OSError):
                    raise OSError(error.__context__.errno, error.__context__.strerror) from error
                raise

    replace(file, write)


def resume(
    file: Path,
    trained: dict[str, nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    identity: dict[str, Any],
) -> tuple[int, float, dict[str, float]]:
    """Load a checkpoint into the parameters and optimisers; return the steps done, their seconds and the log's averages."""
    if not present(file):
        return 0, 0.0, {}
    regular(file, InputError)
    try:
        # Loaded on the CPU: optimisers keep their counters there, and move the rest to its parameter's device. Mapped where a
        # mapped file can be replaced: the processes of a machine then share its pages, and have no copies of their own.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=os.name == "posix")
    except Exception as error:  # torch and zipfile raise many
        raise InputError(f"{file}: not a checkpoint of a run: {shown(str(error))}") from error
    if not isinstance(state, dict) or not isinstance(state.get("identity"), dict):
        raise InputError(
            f"{file}: not a checkpoint of a run: expected one with an identity, got {type(state).__name__}"
        )
    same_run(file, state["identity"], identity)
    try:
        steps, seconds, averages = state["steps"], state["seconds"], state.get("averages", {})
        whole("steps", steps, 0)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state["parameters"][name])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    except (
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
        RuntimeError,
    ) as error:  # what is missing, or of another shape
        raise InputError(
            f"{file}: not a checkpoint of this run: {type(error).__name__}: {shown(str(error))}"
        ) from error
    return steps, seconds, averages


def same_run(
    file: Path, there: dict[str, Any], here: dict[str, Any], advice: str = "name another folder or delete this one"
) -> None:
    """Refuse a file of a run whose identity is another, with InputError."""
    differing = [
        f"{name}: {shown(there.get(name))} there, {shown(here.get(name))} here"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    ]
    if differing:
        raise InputError(f"{file}: of another run; {advice}. {'; '.join(differing)}")
