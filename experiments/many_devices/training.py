"""Runs of examples/train.py, by one process or in shares: their time for a step, and their memory."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from examples.command_line import Failed
from minifocus.inputs.conversations import read_conversations
from minifocus.inputs.processor import Processor
from minifocus.loading.config import load_config
from minifocus.training.examples import encode
from minifocus.training.log import LOG, read_log

from ..record import ROOT
from .group import environments

BATCH = 4  # examples of a step, whatever the number of processes
ANSWER = "It says that the shop is open from nine to five, but for Sundays, when it opens at ten."
LIMIT = 1200  # seconds after which a run has failed


def write_data(folder: Path, picture: Path) -> Path:
    """Conversations of equal length about one picture."""
    shutil.copyfile(picture, folder / "picture.png")
    said = [{"from": "human", "value": "<image>\nWhat does the sign say?"}, {"from": "gpt", "value": ANSWER}]
    records = [{"id": str(number), "image": "picture.png", "conversations": said} for number in range(BATCH)]
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    return folder / "data.json"


def write_picture(file: Path, image: Path, side: int) -> Path:
    with Image.open(image) as opened:
        opened.convert("RGB").resize((side, side)).save(file)
    return file


def tokens_of_step(model: Path, data: Path) -> int:
    """Of all its examples, pictures and all."""
    processor, found = Processor.from_folder(model, load_config(model)), read_conversations(data)
    return sum(len(encode(processor, found[number]).input_ids) for number in range(len(found)))


def train(model: Path, data: Path, count: int | None, steps: int) -> dict[str, Any]:
    """Seconds of each step after the first, and the most bytes resident in a process. `count` None: without --shard.

    The run is killed after so many steps, and leaves nothing.
    """
    words = ["--model", model, "--data", data, "--sampler", "none", "--device", "cpu", "--micro-batch", 1]
    words += ["--batch", BATCH, "--steps", 10_000, "--save-every", 10_000, "--log-every", 1]
    words += [] if count is None else ["--shard"]
    places = environments(count or 1)
    if count is None:
        places = [{"OMP_NUM_THREADS": places[0]["OMP_NUM_THREADS"]}]
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(ROOT / "examples/train.py"), "--out", f"{out}/run", *map(str, words)]
        with started(command, places, Path(out)) as processes:
            step = seconds_of_step(Path(out), processes, steps)
            peaks = [peak(process.pid) for process in processes]
    return {"step": step, "peak": max(peaks)}


@contextlib.contextmanager
def started(command: list[str], places: list[dict[str, str]], out: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The same command in an environment each. What they print goes to files in `out`; they are killed in the end."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, place in enumerate(places):
            environment = {**os.environ, "PYTHONPATH": str(ROOT), **place}
            with (out / f"printed-{rank}").open("wb") as file:
                processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
                )
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def seconds_of_step(out: Path, processes: list[subprocess.Popen[bytes]], steps: int) -> float:
    """The mean of all steps but the first, once the run has taken so many. Raises Failed where a process ends before.

    By this program's clock: the log has tenths of a second.
    """
    begun = time.monotonic()
    first: tuple[float, int] | None = None  # when the log was first seen to have steps, and how many
    while True:
        done, now = len(read_log(out / "run" / LOG)), time.monotonic()
        if first is None and done:
            first = now, done
        elif first is not None and done >= first[1] + steps - 1:
            return (now - first[0]) / (done - first[1])
        for rank, process in enumerate(processes):
            if process.poll() is not None:
                printed = (out / f"printed-{rank}").read_text(encoding="utf-8", errors="replace").splitlines()
                last = next((line for line in reversed(printed) if line.strip()), "nothing was printed")
                raise Failed(f"train.py: process {rank} ended with status {process.returncode}: {last}")
        if now - begun > LIMIT:
            raise Failed(f"train.py: {done} of {steps} steps in {LIMIT} s")
        time.sleep(0.02)


def peak(pid: int) -> int:
    """The most bytes that were resident in a process, of Linux."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
