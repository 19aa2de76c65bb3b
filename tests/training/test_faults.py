"""Processes that die, hang or see another disk end their run with one error that names them; it goes on in another number."""

from __future__ import annotations

import os
import platform
import random
import signal
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
from several import Several
from test_shard import same_figures
from training_runs import ROOT, figures, train

import minifocus
from minifocus.distributed import liveness, processes
from minifocus.training.log import read_log

pytestmark = pytest.mark.usefixtures("one_thread")

COMPANY = Path(__file__).with_name("company.py")
KILLS = int(os.environ.get("MINIFOCUS_KILLS", 1))  # runs with a process that is killed in their middle, by their seeds


def test_what_several_do_together_and_one_that_hangs(tmp_path: Path) -> None:
    """The first may take longer than a collective, folders are told apart, and tasks go to whoever is free."""
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        folder.mkdir()
    with Several(2, COMPANY, tmp_path / "shared", folders=folders) as two:
        while two.out(1).count("\n") != 3:
            assert two.running(), two.all_said()
            time.sleep(0.05)
        begun = time.monotonic()
        while Path(f"/proc/{two.pids[0]}").exists() and "error" not in two.err(0):
            assert time.monotonic() - begun < 60
            time.sleep(0.05)
        os.kill(two.pids[1], signal.SIGKILL)
        assert two.wait() == [1, -signal.SIGKILL]
        named = f"error: process 1 (pid {two.pids[1]} on {platform.node()}) has died or cannot be reached: nothing was heard of"
        assert two.err(0).startswith(named) and two.err(0).count("\n") == 1 and not two.err(1), two.all_said()
        unshared = (
            f"run: expected a folder on a disk that all processes share: process 1 on {platform.node()} does not see"
        )
        for rank in (0, 1):
            lines = two.out(rank).splitlines()
            assert lines[0].startswith(unshared) and lines[1:] == ["shared", "True True 40"]
    assert not list(folders[0].iterdir()) and not list(folders[1].iterdir()) and not (tmp_path / "shared").exists()


@pytest.mark.parametrize("seed", range(KILLS))
def test_a_process_is_killed_at_a_random_moment(data: Path, tmp_path: Path, seed: int) -> None:
    """One of two, and one or three bring the run to its end. A save is under way for a good part of the time."""
    draw = random.Random(seed)
    victim, step, moment, after = draw.randrange(2), draw.randint(1, 2), draw.uniform(0, 0.2), draw.choice((1, 3))
    arguments = ["--data", data, "--steps", 4, "--batch", 6, "--micro-batch", 1, "--max-turns", 1, "--log-every", 1]
    arguments += ["--warmup", 0, "--seed", 20, "--device", "cpu", "--save-every", 1, "--freeze", "vision"]
    done = train("--out", tmp_path / "plain", *arguments)
    assert done.code == 0, done.err

    out = tmp_path / "shared"
    with Several(2, "train", "--out", out, "--shard", *arguments) as two:
        deadline = time.monotonic() + 300
        while not (out / "log.jsonl").exists() or len(read_log(out / "log.jsonl")) < step:
            assert two.running() and time.monotonic() < deadline, two.all_said()
            time.sleep(0.005)
        time.sleep(moment)
        os.kill(two.pids[victim], signal.SIGKILL)
        begun = time.monotonic()
        codes = two.wait(60)
        told = two.err(1 - victim)
    assert codes == ([-signal.SIGKILL, 1] if victim == 0 else [1, -signal.SIGKILL]), told
    assert told.startswith(f"error: process {victim} (pid {two.pids[victim]} on {platform.node()})"), told
    assert told.count("\n") == 1 and time.monotonic() - begun < 30 and not (out / "model").exists(), told

    with Several(after, "train", "--out", out, "--shard", *arguments) as others:
        assert others.wait() == [0] * after, others.all_said()
    assert [line["step"] for line in figures(out)] == [1, 2, 3, 4]
    same_figures(tmp_path / "plain", out)
    assert [file.name for file in out.glob("*checkpoint*")] == ["checkpoint-00000004"]


@pytest.mark.parametrize(
    ("launcher", "words"),
    [
        ("torchrun", r"process 0: expected 3 processes, and 1, 2 did not come within 0:00:01"),
        ("another", r"process 0: cannot reach the others at localhost:\d+: .* 1/3 clients joined"),
    ],
)
def test_those_that_do_not_come(monkeypatch: pytest.MonkeyPatch, launcher: str, words: str) -> None:
    """torchrun keeps the store itself; otherwise it is the first process."""
    monkeypatch.setattr(processes, "JOINING", timedelta(seconds=1))
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    port = str(store.port if launcher == "torchrun" else 0)
    place = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    place["TORCHELASTIC_USE_AGENT_STORE"] = str(launcher == "torchrun")
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(minifocus.InputError, match=words):
        processes.Process.join(torch.device("cpu"))


def test_what_nccl_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own limit, after which its watchdog ends a process that waits: no GPU is here to try it on."""
    group = mock.Mock()
    monkeypatch.setattr(torch.distributed, "init_process_group", group)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    with processes.joined(torch.device("cuda"), even_alone=True):
        pass
    assert group.call_args.args == ("nccl",)
    assert timedelta(minutes=1) < group.call_args.kwargs["timeout"] < timedelta(hours=2)


def test_the_page_has_the_limits() -> None:
    page = " ".join((ROOT / "docs/scale.md").read_text(encoding="utf-8").split("### When a process dies")[1].split())
    for words in (
        f"after {liveness.CONNECTION:.0f} seconds if its connection broke, after {liveness.SILENT:.0f} if nothing is heard",
        f"after {liveness.SILENT:.0f} seconds without a sign of life",
        f"the collective's time-out, {processes.COLLECTIVE.total_seconds() / 60:.0f} minutes",
        f"the others say which, after {processes.JOINING.total_seconds() / 60:.0f} minutes",
    ):
        assert words in page
