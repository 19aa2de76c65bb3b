"""One question to a model in a process of its own: what loading and answering take in time and in memory.

python -m experiments.true_size.question DIR --sampler focus --side 672    # prints one line of JSON

Processor time is that of all threads. Memory is the process's, of Linux: "anonymous" is what the system cannot drop and read
again from the model's files (RssAnon, looked at 200 times a second), "resident" all that was ever in memory at once
(VmHWM), the mapped files included. On a GPU, "device" is torch's peak of allocated memory, and a question before the measured
one ("first_question", with two tokens of answer) has CUDA's libraries loaded.
"""

from __future__ import annotations

from examples import command_line

if __name__ == "__main__":
    command_line.begin()

import argparse
import json
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

import minifocus
from examples.command_line import Failed, Refused
from minifocus.cpu_memory import give_back_freed_memory
from minifocus.generate import Generation
from minifocus.inputs.open_image import open_image
from minifocus.load import usable_device

from ..flops import decoder_flops, router_flops, vision_flops
from ..record import ROOT

QUESTION = "What does the sign say?"
STATUS = Path("/proc/self/status")
LOOKS = 200  # at the anonymous memory, a second

Result = TypeVar("Result")


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


class Watch:
    """The largest anonymous memory since the last `peak`. The system keeps such a mark for the resident set alone."""

    def __init__(self) -> None:
        self._most = 0
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self._most = max(self._most, status("RssAnon"))
            time.sleep(1 / LOOKS)

    def peak(self) -> int:
        most, self._most = max(self._most, status("RssAnon")), 0
        return most


class Clock:
    """Seconds of the wall's clock and of the processors, of work that is done when `done` returns."""

    def __init__(self, device: torch.device):
        self.device = device
        self.begin()

    def begin(self) -> None:
        self._begun = self._now()

    def done(self) -> dict[str, float]:
        wall, processor = (now - begun for now, begun in zip(self._now(), self._begun, strict=True))
        return {"wall": wall, "processor": processor}

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def options_of(sampler: str, folder: Path) -> dict[str, Any]:
    """A folder without a learned selector gets the stand-in."""
    needed = sampler in ("focus", "vision") and not (folder / "selector.safetensors").is_file()
    return {"selector": "variance"} if needed else {}


def ask(arguments: argparse.Namespace) -> dict[str, Any]:
    give_back_freed_memory()  # as examples/generate.py has it
    watch = Watch()
    memory = {"imports": watch.peak()}
    side, device = arguments.side, usable_device(arguments.device)
    options = options_of(arguments.sampler, arguments.folder)
    picture = open_image(arguments.image).resize((side, side))
    clock = Clock(device)
    model = minifocus.load(arguments.folder, arguments.sampler, device, arguments.dtype, **options)
    seconds = {"load": clock.done()}
    memory["load"] = watch.peak()
    if device.type == "cuda":
        clock.begin()
        model.generate(picture, QUESTION, max_new_tokens=2, min_new_tokens=2)
        seconds["first_question"] = clock.done()
        torch.cuda.reset_peak_memory_stats()

    tower = Clock(device)
    model.vision_tower.register_forward_pre_hook(lambda *_: tower.begin())
    model.vision_tower.register_forward_hook(lambda *_: seconds.update(tower=tower.done()))
    clock.begin()
    count = arguments.new_tokens
    generation = Generation(
        model, model.processor, [picture], [QUESTION], dict(max_new_tokens=count, min_new_tokens=count)
    )
    (row,), logits, steps = generation.rows, generation.prefill(), []
    seconds["first_token"] = clock.done()
    memory["first_token"] = watch.peak()
    while True:
        if not logits.isfinite().all():
            raise Failed(f"{arguments.folder}: logits are not finite after {len(row.token_ids)} tokens of the answer")
        chosen = row.choose(logits[0])
        if row.finish:
            break
        clock.begin()
        logits = generation.decode([chosen])
        steps.append(clock.done())
    memory["answer"] = watch.peak()
    memory["resident"] = status("VmHWM")
    if device.type == "cuda":
        memory["device"] = torch.cuda.max_memory_allocated()
    if steps:
        seconds["token"] = {name: median(step[name] for step in steps) for name in steps[0]}

    (answer,), tiles = generation.answers(), model.num_tiles((side, side))
    flops = decoder_flops(model.config, answer.layer_tokens) + vision_flops(model.config, tiles)
    return {
        "seconds": seconds,
        "memory": memory,
        "tokens": vars(answer.tokens),
        "text": answer.text,
        "flops": flops + router_flops(model.before_llm, tiles),
        "dtype": str(model.dtype).removeprefix("torch."),
        "options": options,
        "threads": torch.get_num_threads(),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that all questions of a run have in common."""
    parser.add_argument("--dtype", help="as minifocus.load takes it; default: the folder's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--image", type=Path, default=ROOT / "examples/cards.png", help="picture, resized to a square")
    parser.add_argument("--new-tokens", type=int, default=16, help="of the answer")


@command_line.guarded
def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sampler", default="focus", choices=minifocus.methods.names())
    parser.add_argument("--side", type=int, default=336, help="of the picture, in pixels")
    add_arguments(parser)
    arguments = parser.parse_args()
    command_line.expect_numbers(arguments, 1, "side new_tokens", 1e5)
    if not STATUS.exists():
        raise Refused("memory is measured by Linux's /proc/self/status, which is not there")
    print(json.dumps(ask(arguments)))


if __name__ == "__main__":
    command_line.run(main)
