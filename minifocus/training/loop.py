"""Steps: gradient accumulation, several processes, learning-rate schedule, checkpoints that resume exactly, a log."""

from __future__ import annotations

import ctypes
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..arguments import LARGEST, number, shown, whole
from ..errors import InputError
from ..files.locks import hold
from ..files.reading import present, regular
from ..files.writing import clear, replace
from .muon import Muon

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
MOST_EXAMPLES = 2**20  # of a step, which are all in memory
MOST = 1e6  # of a rate or factor: beyond it float32 soon has no numbers


@dataclass(frozen=True)
class Settings:
    """
    steps           optimiser steps of the whole run
    batch           examples per step, over all processes
    micro_batch     examples per forward pass of one process; batch / micro_batch is shared out among the processes
    warmup_steps    over which the learning rates rise; they then fall by a cosine to `final_lr` of their peak
    max_grad_norm   gradients are scaled down to this norm
    muon            matrices between hidden states by Muon, the rest by AdamW; else all by AdamW
    betas           AdamW's
    weight_decay    of all but vectors (norms, biases) and the selector
    bf16            forward and backward in bfloat16 where PyTorch's autocast does so; weights stay in their dtype
    save_every      steps between checkpoints
    log_every       steps between lines of the log
    """

    steps: int
    batch: int
    micro_batch: int
    warmup_steps: int = 0
    final_lr: float = 0.0
    max_grad_norm: float = 1.0
    muon: bool = False
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    bf16: bool = False
    save_every: int = 100
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "save_every", "log_every"):
            whole(name, getattr(self, name), 1)
        whole("batch", self.batch, 1, MOST_EXAMPLES)
        whole("micro_batch", self.micro_batch, 1, MOST_EXAMPLES)
        whole("warmup_steps", self.warmup_steps, 0)
        for name in ("final_lr", "weight_decay"):
            number(name, getattr(self, name), 0, MOST)

    def lr_factor(self, step: int) -> float:
        """The learning rates of step 0, 1, … as a share of their peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        through = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * through))


class MicroBatches(Protocol):
    """The micro-batches of a run by number; each has `num_targets`, how many terms its loss is a sum of."""

    def share(self, numbers: Iterable[int], workers: int = 0) -> Iterator[Any]: ...


@dataclass(frozen=True)
class Process:
    """One of the processes that share a run: `torchrun` sets the environment that says which."""

    rank: int
    count: int

    @staticmethod
    def join(device: torch.device) -> Process:
        """Meet the others, if there are any."""
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
            # Imported with a group there, as DistributedDataParallel would, it keeps that group's threads alive beyond
            # `leave`, and now and then Python aborts at its end.
            import torch._dynamo  # noqa: F401

            # The others wait while the first validates or saves, on slow disks for longer than the 10 minutes that NCCL
            # allows by itself. One that dies needs no limit: torchrun ends the others.
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
        return Process.current()

    @staticmethod
    def current() -> Process:
        return Process(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Process(0, 1)

    def sum(self, value: int, device: torch.device) -> int:
        if self.count == 1:
            return value
        total = torch.tensor(value, device=device)
        dist.all_reduce(total)
        return int(total)

    def gather(self, value: Any) -> list[Any]:
        """What each process has, in the order of their ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def first(self, work: Callable[[], object]) -> None:
        """Have the first do this while the others wait. An InputError of its is one of all, so that none waits for ever."""
        refused: InputError | None = None
        if self.rank == 0:
            try:
                work()
            except InputError as error:
                refused = error
        told = self.gather(refused)[0]
        if isinstance(told, InputError):
            raise told

    @contextmanager
    def alone(self, folder: Path) -> Iterator[None]:
        """Be the only run that writes into `folder` (see `locks.hold`): the first holds it, for all of them."""
        with ExitStack() as held:
            self.first(lambda: held.enter_context(hold(folder)))
            yield

    def leave(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()


# Embeddings and heads, whose rows stand for themselves, and the selector: no matrices between hidden states.
_NOT_FOR_MUON = ("embed", "lm_head", "heads.", "selector.")


def make_optimizers(
    module: nn.Module, lr_of: Callable[[str], float], settings: Settings
) -> list[torch.optim.Optimizer]:
    """Optimisers over the parameters whose learning rate, by name, is above 0; the others are frozen."""
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        lr = lr_of(name)
        parameter.requires_grad_(lr > 0)
        if lr > 0:
            muon = settings.muon and parameter.dim() == 2 and not any(part in name for part in _NOT_FOR_MUON)
            decays = parameter.dim() > 1 and "selector" not in name
            groups.setdefault((muon, lr, settings.weight_decay if decays else 0.0), []).append(parameter)
    if not groups:
        raise InputError("learning rates: expected at least one above 0, got none: nothing would be trained")

    def of_kind(wanted: bool) -> list[dict[str, Any]]:
        return [
            {"params": own, "lr": lr, "peak_lr": lr, "weight_decay": decay}
            for (muon, lr, decay), own in groups.items()
            if muon == wanted
        ]

    optimizers: list[torch.optim.Optimizer] = []
    if of_kind(True):
        optimizers.append(Muon(of_kind(True)))
    if of_kind(False):
        optimizers.append(torch.optim.AdamW(of_kind(False), betas=settings.betas))
    return optimizers


class Log:
    """One JSON object per line, of the first process; lines of steps that a resumed run repeats are dropped.

    The file is a new one, so that none is written to that a link in the run's folder leads to. Raises InputError where it
    cannot be written.
    """

    def __init__(self, file: Path, first_step: int):
        self.file = file
        kept = [line for line in read_log(file) if line["step"] <= first_step]

        def write(unfinished: Path) -> None:
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

        replace(file, write)

    def write(self, **values: Any) -> None:
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()})
        try:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        except OSError as error:
            raise InputError(f"{self.file}: cannot be written: {error.strerror}") from error


def read_log(file: Path) -> list[dict[str, Any]]:
    """The lines of a log, without a last one that was cut off. Raises InputError where one is not of a run."""
    lines: list[dict[str, Any]] = []
    if not present(file):
        return lines
    cut_off = 0
    try:
        with regular(file, InputError).open("rb") as stream:
            for place, text in enumerate(stream, 1):
                if cut_off:
                    raise InputError(f"{file}: line {cut_off}: expected an object with a step, got what is not JSON")
                try:
                    line = json.loads(text.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise InputError(f"{file}: line {place}: expected text in UTF-8, got {shown(text)}") from error
                except RecursionError as error:
                    raise InputError(f"{file}: line {place}: nested too deeply") from error
                except ValueError:
                    cut_off = place
                    continue
                step = line.get("step") if isinstance(line, dict) else None
                if not isinstance(step, int) or not 0 <= step <= LARGEST:
                    raise InputError(f"{file}: line {place}: expected an object with a step, got {shown(line)}")
                lines.append(line)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    return lines


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
    `identity` is what makes two runs the same one: a checkpoint with another is refused with InputError, as is a folder
    that another process writes into (see `locks.hold`).
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
    check_memory(task, device, settings.bf16)
    with process.alone(folder):
        first, seconds, averages = _resume(folder / CHECKPOINT, trained, optimizers, identity)
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
        if process.count > 1:
            # Text alone does not use the tower; gradients in the buckets that are sent are not there twice.
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
            _save(folder / CHECKPOINT, trained, optimizers, identity, done, time.perf_counter() - begun, averages)

        def report() -> None:
            if log is not None and validate is not None:
                task.eval()
                log.write(step=done, **validate())

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
                    with nullcontext() if last or process.count == 1 else wrapped.no_sync():  # type: ignore[operator]
                        with amp:
                            loss, parts = wrapped(batch, targets, per_step)
                        (loss * process.count).backward()  # the processes' gradients are averaged, not added
                    figures.append(parts)
                norm = nn.utils.clip_grad_norm_(trained.values(), settings.max_grad_norm)
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
                        log.write(step=done, seconds=round(time.perf_counter() - begun, 1), lr=factor, **averages)
                if validate is not None and validate_every and (done % validate_every == 0 or done == settings.steps):
                    process.first(report)
                if done % settings.save_every == 0 or done == settings.steps:
                    process.first(save)
        return time.perf_counter() - begun


def check_memory(task: nn.Module, device: torch.device, bf16: bool) -> None:
    """Whether a GPU has room for what every process keeps beside the weights: rather than run out of it after minutes."""
    if device.type != "cuda":
        return
    trained = sum(p.numel() * p.element_size() for p in task.parameters() if p.requires_grad)
    copies = 2 * sum(p.numel() for p in task.parameters()) if bf16 else 0  # autocast's, which the backward pass needs
    needed, (free, _) = 3 * trained + copies, torch.cuda.mem_get_info(device)  # a gradient and two moments
    if needed > free:
        raise InputError(
            f"device: expected at least {needed / 1e9:.1f} GB free beside the weights for gradients, AdamW's moments and "
            f"bfloat16 copies, activations not counted, got {free / 1e9:.1f} GB on {device}: processes share the examples, "
            "not these. Freeze the largest part"
        )


def _average(averages: dict[str, float], figures: Sequence[dict[str, float]], share: float = 0.05) -> None:
    """Running means of the figures that a step reported."""
    for name in dict.fromkeys(name for parts in figures for name in parts):
        values = [parts[name] for parts in figures if name in parts]
        value = sum(values) / len(values)
        averages[name] = value if name not in averages else (1 - share) * averages[name] + share * value


def _save(
    file: Path,
    trained: dict[str, nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    identity: dict[str, Any],
    steps: int,
    seconds: float,
    averages: dict[str, float],
) -> None:
    """In one piece: a run that is killed here leaves the checkpoint before. InputError where it cannot be written."""
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
            except RuntimeError as error:  # of torch's own writer, after the system's error
                if isinstance(error.__context__, OSError):
                    raise OSError(error.__context__.errno, error.__context__.strerror) from error
                raise

    replace(file, write)


def _resume(
    file: Path,
    trained: dict[str, nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    identity: dict[str, Any],
) -> tuple[int, float, dict[str, float]]:
    """Steps already done, the seconds that they took and the log's averages, after loading what they made."""
    if not present(file):
        return 0, 0.0, {}
    regular(file, InputError)
    try:
        # On the CPU, where the optimisers keep their counters; the rest they move to its parameter's device. Mapped, where a
        # mapped file can be replaced: the processes of a machine share its pages, each would have a copy otherwise.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=os.name == "posix")
    except Exception as error:  # torch and zipfile raise many
        raise InputError(f"{file}: not a checkpoint of a run: {shown(str(error))}") from error
    if not isinstance(state, dict) or not isinstance(state.get("identity"), dict):
        raise InputError(
            f"{file}: not a checkpoint of a run: expected one with an identity, got {type(state).__name__}"
        )
    differing = [
        f"{name}: {shown(state['identity'].get(name))} there, {shown(identity.get(name))} here"
        for name in sorted({*state["identity"], *identity})
        if state["identity"].get(name) != identity.get(name)
    ]
    if differing:
        raise InputError(f"{file}: of another run; name another folder or delete this one. {'; '.join(differing)}")
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


def keep_freed_memory() -> None:
    """Have glibc keep the memory that is freed: the arrays of a step on a CPU are the same again in the next.

    By default each large one is a new mapping, whose pages the system has to clear. Nothing happens where the C library
    is another.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    trim_threshold, mmap_threshold, largest = -1, -3, 2**31 - 1
    mallopt(trim_threshold, largest)
    mallopt(mmap_threshold, largest)
