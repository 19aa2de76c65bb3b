"""The checkpoint of a run whose processes each hold a share: a folder, written by all of them with torch.distributed.checkpoint.

Another number of processes goes on from it as well: each reads the rows that are then its own.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ..arguments import shown, whole
from ..distributed.processes import Process
from ..errors import CheckpointError, InputError
from ..files.reading import FOLDER, kind, named, read_json
from .checkpoint import CHECKPOINT, same_run

_NAME, _UNFINISHED, _RUN = "checkpoint-{:08d}", ".unfinished-checkpoint", "run.json"
_FOLDER = re.compile(r"checkpoint-\d{8,}")


def _found(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first: more than one where a process was killed before it removed the older."""
    return sorted(path for path in folder.glob("checkpoint-*") if _FOLDER.fullmatch(path.name))


def save_shards(
    folder: Path,
    trained: dict[str, nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    identity: dict[str, Any],
    steps: int,
    seconds: float,
    averages: dict[str, float],
) -> None:
    """Write the whole checkpoint or none, by all processes: a run that is killed here leaves the one before.

    Raises InputError.
    """
    process, unfinished = Process.current(), folder / _UNFINISHED
    process.first(lambda: shutil.rmtree(unfinished, ignore_errors=True))
    try:
        save(_tensors(trained, optimizers), checkpoint_id=unfinished)
    except (OSError, CheckpointException) as error:
        raise InputError(f"{named(unfinished)}: cannot be written: {shown(str(error))}") from error

    def finish() -> None:
        about = {"identity": identity, "steps": steps, "seconds": seconds, "averages": averages}
        before = _found(folder)
        try:
            (unfinished / _RUN).write_text(json.dumps(about), encoding="utf-8")
            unfinished.rename(folder / _NAME.format(steps))
        except OSError as error:
            raise InputError(f"{named(unfinished)}: cannot be written: {error.strerror}") from error
        for older in before:
            shutil.rmtree(older, ignore_errors=True)

    process.first(finish)


def resume_shards(
    folder: Path,
    trained: dict[str, nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    identity: dict[str, Any],
) -> tuple[int, float, dict[str, float]]:
    """Load a checkpoint into the parameters and optimisers; return the steps done, their seconds and the log's averages."""
    every = _found(folder)
    if not every:
        return 0, 0.0, {}
    there = every[-1]
    if kind(there) != FOLDER:
        raise InputError(f"{named(there)}: expected a folder, found {kind(there)}")
    try:
        about = read_json(there / _RUN)
    except CheckpointError as error:
        raise InputError(f"{named(there)}: not a checkpoint of a run: {error}") from error
    if not isinstance(about.get("identity"), dict):
        raise InputError(f"{named(there)}: not a checkpoint of a run: expected one with an identity")
    same_run(there, about["identity"], json.loads(json.dumps(identity)))
    try:
        steps, seconds, averages = about["steps"], about["seconds"], about["averages"]
        whole("steps", steps, 0)
        known = FileSystemReader(there).read_metadata().state_dict_metadata
        _begin_states(trained, optimizers, known)
        state = _tensors(trained, optimizers)
        load(state, checkpoint_id=there)
    except (
        Exception,
        CheckpointException,
    ) as error:  # torch and pickle raise many, CheckpointException is none of Exception
        raise InputError(
            f"{named(there)}: not a checkpoint of this run: {type(error).__name__}: {shown(str(error))}"
        ) from error
    return steps, seconds, averages


def _states(
    trained: dict[str, nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]
) -> list[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
    """Each trained parameter's name, itself, and its optimiser."""
    names = {parameter: name for name, parameter in trained.items()}
    return [
        (names[parameter], parameter, optimizer)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def _tensors(trained: dict[str, nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """What is written, by names that say nothing of the order of parameters: the parameters, and what optimisers keep of each."""
    tensors: dict[str, Any] = {f"parameters.{name}": parameter.detach() for name, parameter in trained.items()}
    for name, parameter, optimizer in _states(trained, optimizers):
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizers.{key}.{name}"] = value
    return tensors


def _begin_states(
    trained: dict[str, nn.Parameter], optimizers: Sequence[torch.optim.Optimizer], known: dict[str, Any]
) -> None:
    """Make room for what optimisers keep, as their first step would: counters on the CPU, the rest like its parameter."""
    for name, parameter, optimizer in _states(trained, optimizers):
        for key in ("step", "exp_avg", "exp_avg_sq", "average"):
            if f"optimizers.{key}.{name}" in known:
                room = torch.zeros(()) if key == "step" else torch.zeros_like(parameter)
                optimizer.state[parameter][key] = room


def refuse_other(folder: Path, sharded: bool) -> None:
    """Refuse to begin anew where a run of the other kind, with or without shares, has left its checkpoint."""
    other = [folder / CHECKPOINT] if sharded else _found(folder)[-1:]
    for file in other:
        if file.exists():
            raise InputError(
                f"{named(file)}: of a run {'without' if sharded else 'with'} --shard: name another folder or delete this one"
            )
