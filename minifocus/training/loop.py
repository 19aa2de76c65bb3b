"""The steps of a run: gradient accumulation, several processes, validation, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..attention_kernels import no_plans
from ..distributed.processes import Process
from ..errors import InputError
from ..files.writing import clear
from .checkpoint import CHECKPOINT, resume, save_checkpoint
from .log import LOG, Log
from .memory import check_memory, peak_memory
from .settings import Settings
from .sharded_checkpoint import refuse_other, resume_shards, save_shards


class MicroBatches(Protocol):
    """The micro-batches of a run by number; each has `num_targets`, how many terms its loss is a sum of."""

    def share(self, numbers: Iterable[int], workers: int = 0) -> Iterator[Any]: ...


def fit(
    task: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: MicroBatches,
    settings: Settings,
    folder: Path,
    device: torch.device,
    identity: dict[str, Any],
    workers: int = 0,
    validate: Callable[[], dict[str, Any]] | None = None,
    validate_every: int = 0,
    title: str = "training",
) -> float:
    """Train `task` for `settings.steps` steps, from `folder`'s checkpoint if there is one; returns the seconds it took.

    `task(micro_batch, num_targets, num_batches)` gives a micro-batch's part of a step's loss, and figures to report; the
    two numbers are of the whole step, over all processes (see `objective.AnswerObjective`).

    Every step's examples and random choices follow from the seed and the step, and micro-batches are the same whatever the
    number of processes: a run that was interrupted ends in the weights of one that was not, bit for bit on the CPU.
    `identity` says which run this is. InputError is raised for a checkpoint with another identity, and for a folder that
    another process writes into (see `locks.hold`).
    """
    process = Process.current()
    per_step = settings.batch // settings.micro_batch
    if settings.batch % settings.micro_batch or per_step % process.count:
        raise InputError(
            f"batch: expected a multiple of micro_batch x processes = {settings.micro_batch} x {process.count}, "
            f"got {settings.batch}"
        )
    identity = {**identity, **asdict(settings), "betas": list(settings.betas)}
    for name in ("save_every", "log_every"):
        identity.pop(name)
    trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
    sharded = isinstance(task, FSDPModule)
    check_memory(task, device, settings.bf16)
    with process.alone(folder):
        refuse_other(folder, sharded)
        first, seconds, averages = (
            resume_shards(folder, trained, optimizers, identity)
            if sharded
            else resume(folder / CHECKPOINT, trained, optimizers, identity)
        )
        begins = process.gather(first)
        if len(set(begins)) > 1:
            raise InputError(
                f"{folder / CHECKPOINT}: expected one that all processes see, got runs that go on after {begins} steps: "
                "the folder must be on a disk that they share"
            )
        log: Log | None = None

        def begin_log() -> None:
            nonlocal log
            clear(folder)
            log = Log(folder / LOG, first)

        process.first(begin_log)
        wrapped: nn.Module = task
        if process.count > 1 and not sharded:
            # Text alone does not use the tower. Gradients as views of the buckets that are sent take no memory of their own.
            wrapped = DistributedDataParallel(task, find_unused_parameters=True, gradient_as_bucket_view=True)
        # Without autocast's cache: what the text-guided sampler casts without a gradient, the layer after it needs with one.
        amp = torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16, cache_enabled=False)
        mine = (
            step * per_step + micro
            for step in range(first, settings.steps)
            for micro in range(process.rank, per_step, process.count)
        )
        stream = batches.share(mine, workers)
        accumulated = per_step // process.count
        begun = time.perf_counter() - seconds

        def save() -> None:
            state = trained, optimizers, identity, done, time.perf_counter() - begun, averages
            if sharded:
                save_shards(folder, *state)
            else:
                process.first(lambda: save_checkpoint(folder / CHECKPOINT, *state))

        def report() -> None:
            if validate is not None:
                task.eval()
                found = validate()
                if log is not None:
                    log.write(step=done, **found)

        hidden = None if process.rank == 0 else True
        with tqdm(total=settings.steps, initial=first, desc=title, disable=hidden) as bar:
            for step in range(first, settings.steps):
                factor = settings.lr_factor(step)
                for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                    group["lr"] = group["peak_lr"] * factor
                task.train()
                own = [next(stream) for _ in range(accumulated)]
                targets = max(1, process.sum(sum(batch.num_targets for batch in own), device))
                task.zero_grad(set_to_none=True)
                figures: list[dict[str, float]] = []
                for number, batch in enumerate(own):
                    last = number == accumulated - 1
                    with nullcontext() if last or wrapped is task else wrapped.no_sync():  # type: ignore[operator]
                        with amp:
                            loss, parts = wrapped(batch, targets, per_step)
                        with no_plans():  # for layers that are run again (gradient checkpointing)
                            (loss * process.count).backward()  # the processes' gradients are averaged, not added
                    figures.append(parts)
                norm = nn.utils.clip_grad_norm_(trained.values(), settings.max_grad_norm)
                norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
                if not math.isfinite(float(norm)):
                    raise InputError(
                        f"step {step + 1}: the gradient is not finite. A new run with lower learning rates may get past this; "
                        "this one would come to the same step again"
                    )
                for optimizer in optimizers:
                    optimizer.step()

                every = zip(
                    *process.gather(figures), strict=True
                )  # the first micro-batch of each process, the second …
                _average(averages, [parts for together in every for parts in together])
                done = step + 1
                if log is not None:
                    bar.update()
                    bar.set_postfix_str(
                        " ".join(f"{name} {value:.3g}" for name, value in averages.items()), refresh=False
                    )
                    if done % settings.log_every == 0 or done == settings.steps:
                        seconds = round(time.perf_counter() - begun, 1)
                        log.write(step=done, seconds=seconds, lr=factor, **averages, **peak_memory(device))
                if validate is not None and validate_every and (done % validate_every == 0 or done == settings.steps):
                    report() if sharded else process.first(report)
                if done % settings.save_every == 0 or done == settings.steps:
                    save()
        return time.perf_counter() - begun


def _average(averages: dict[str, float], figures: Sequence[dict[str, float]], share: float = 0.05) -> None:
    """Running means of the figures that a step reported."""
    for name in dict.fromkeys(name for parts in figures for name in parts):
        values = [parts[name] for parts in figures if name in parts]
        value = sum(values) / len(values)
        averages[name] = value if name not in averages else (1 - share) * averages[name] + share * value
