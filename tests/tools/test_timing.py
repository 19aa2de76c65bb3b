"""experiments/timing.py and clocks.py: which rounds count as disturbed, and what becomes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forked import python

from examples import command_line
from experiments import clocks, quantized, record
from experiments.clocks import Spent, read
from experiments.end_to_end_programs import Settings, make_checkpoint
from experiments.timing import columns, interleaved, ratio, remark

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("wall", "processor", "waiting", "threads", "disturbed"),
    [
        (10, 16.0, 0, 2, False),
        (10, 15.9, 0, 2, True),
        (10, 8.0, 0, 1, False),
        (10, 7.9, 0, 1, True),
        (10, 11, 2, 1, False),  # two threads, now and then: they wanted 13 s of processors
        (10, 11, 4, 1, True),  # and here 15
        (10, 19, 30, 1, False),  # eight threads that wait for one another have both cores
        (10, 12, 30, 1, True),  # or had them but for another process
        (10, 0, 0, 0, False),  # a GPU's time
    ],
)
def test_the_rule(
    wall: float, processor: float, waiting: float, threads: int, disturbed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clocks, "CORES", 2)
    assert Spent(wall, processor, waiting, threads).disturbed == disturbed


class FakeTime:
    """Clocks that stand still until they are told to go on."""

    def __init__(self) -> None:
        self.wall, self.processor = 100.0, 7.0

    def perf_counter(self) -> float:
        return self.wall

    def process_time(self) -> float:
        return self.processor

    def pass_by(self, wall: float, processor: float) -> None:
        self.wall, self.processor = self.wall + wall, self.processor + processor


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTime]:
    found = FakeTime()
    monkeypatch.setattr(clocks, "time", found)
    monkeypatch.setattr(clocks, "_waiting", lambda children: 0.0)
    yield found


def test_a_disturbed_round_is_run_again_for_all_sides(fake: FakeTime, capsys: pytest.CaptureFixture[str]) -> None:
    """Their ratio is that of one round. Rounds to warm up are not watched."""
    # Per round of the two sides: had all of two threads, or half.
    shares = iter([(0.5, 1), (1, 1), (1, 0.5), (0.5, 1), (1, 1), (1, 1)])
    asked: list[tuple[str, int]] = []
    now: tuple[float, float] = (0, 0)

    def run(side: str, number: int) -> Spent:
        nonlocal now
        asked.append((side, number))
        if side == "a":
            now = next(shares)
        begun = read()
        fake.pass_by(3.0 + len(asked), 2 * (3.0 + len(asked)) * now[side == "b"])
        return Spent.since(begun, threads=2)

    sides = {side: lambda number, side=side: run(side, number) for side in "ab"}
    found = interleaved(sides, lambda one: [one], rounds=3, warm_up=1, title="round")
    assert asked == [(side, number) for number in (0, 1, 2, 2, 2, 3) for side in "ab"]
    assert found.note() == {"rounds": 3, "disturbed": 0, "repeated": 2}
    assert {side: [one.wall for one in own] for side, own in found.results.items()} == {
        "a": [6.0, 12.0, 14.0],
        "b": [7.0, 13.0, 15.0],
    }
    assert not any(one.disturbed for own in found.results.values() for one in own)
    assert ratio([6, 12, 14], [7, 13, 15]) == 12 / 13
    assert capsys.readouterr().err.splitlines()[2:5] == ["round 3 of 4", *["round 3 of 4, again: disturbed"] * 2]


def test_a_machine_that_stays_busy_is_reported_and_ends(fake: FakeTime) -> None:
    def run(number: int) -> Spent:
        begun = read()
        fake.pass_by(1.0, 0.7)
        return Spent.since(begun, calls=2)

    found = interleaved({"only": run}, lambda one: [one], rounds=4)
    assert found.note() == {"rounds": 4, "disturbed": 4, "repeated": 4}
    assert columns(found.results["only"]) == {
        "rounds": [0.5] * 4,
        "processor": [0.35] * 4,
        "waiting": [0.0] * 4,
        "threads": 1,
    }
    assert remark(found.note()) == "4 of 4 rounds were disturbed by other work (4 were run again)."
    quiet = {"rounds": 5, "disturbed": 0, "repeated": 0}
    assert remark(quiet) == "None of 5 rounds was disturbed by other work."
    assert remark(quiet, found.note()) == "4 of 9 rounds were disturbed by other work (4 were run again)."
    assert remark() == ""  # nothing is claimed of a record without a note


def test_a_run_that_does_nothing_is_not_what_is_measured() -> None:
    begun = read()
    time.sleep(0.05)
    assert Spent.since(begun).disturbed


BUSY = "import os\nos.sched_setaffinity(0, {CORE})\nprint('busy', flush=True)\nwhile True: pass"
TIMED = """
import os, time
os.sched_setaffinity(0, {CORE})
from experiments.clocks import Spent, read
begun = read()
while time.perf_counter() < begun.wall + 1: pass
print(Spent.since(begun).disturbed)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are kept on one core as Linux does it")
def test_a_busy_process_on_the_same_core_is_noticed() -> None:
    """Each gets a half, whatever else the machine does."""
    core = str(min(os.sched_getaffinity(0)))
    busy = subprocess.Popen([sys.executable, "-c", BUSY.replace("CORE", core)], stdout=subprocess.PIPE, text=True)
    try:
        assert busy.stdout is not None and busy.stdout.readline() == "busy\n"
        command = [sys.executable, "-c", TIMED.replace("CORE", core)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout == "True\n"
    finally:
        busy.kill()
        busy.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="resource.getrusage of children")
def test_children_s_time_is_theirs() -> None:
    spin = "import time\nwhile time.process_time() < 0.3: pass"
    own, theirs = read(), read(children=True)
    subprocess.run([sys.executable, "-c", spin], check=True, timeout=60)
    assert Spent.since(theirs).processor >= 0.3 > Spent.since(own).processor


def test_a_record_names_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx avx2 avx512f avx512_bf16 amx_tile avx512cd\n\n"
        "processor\t: 1\nmodel name\t: Another\nflags\t\t: fpu\n"
    )
    monkeypatch.setattr(record, "CPUINFO", cpuinfo)
    monkeypatch.setattr(os, "getloadavg", lambda: (1.256, 9, 9))
    found = record.machine()
    assert found["cpu"] == "Some CPU" and found["load_average"] == 1.26
    assert found["flags"] == ["avx2", "avx512f", "avx512_bf16", "amx_tile"]
    monkeypatch.setattr(record, "CPUINFO", tmp_path / "none")
    assert record.machine()["flags"] == [] and record.machine()["cpu"]


def test_quick_run_of_quantized_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Decode's times are of the longest prompt alone; every kind of weights is compared with bfloat16."""

    def load(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """The program that loads a folder, forked after the imports."""
        assert command[:2] == [sys.executable, "-c"] and options["cwd"] == ROOT
        (tmp_path / "load.py").write_text(command[2])
        return python(tmp_path / "load.py", *command[3:])

    def make(settings: Settings, name: str) -> SimpleNamespace:
        """In this process, which has transformers for other tests."""
        assert name == "checkpoint"
        return SimpleNamespace(answer=lambda: make_checkpoint(settings))

    file = tmp_path / "quantized.json"
    monkeypatch.setattr(command_line, "call", load)
    monkeypatch.setattr(quantized, "Worker", make)
    monkeypatch.setattr(sys, "argv", ["quantized", "--quick", "--rounds", "2", "--out", str(file)])
    assert quantized.main() == 0, capsys.readouterr().err
    record = json.loads(file.read_text())
    assert record["rounds"]["rounds"] == 2
    assert set(record["times"]) == {"prefill_32", "prefill_200", "decode"}
    for kinds in record["times"].values():
        assert set(kinds) == {"bfloat16", "int8", "int4"}
        assert all(len(one["rounds"]) == 2 and min(one["rounds"]) > 0 for one in kinds.values())
        assert kinds["bfloat16"]["ratio_to_bfloat16"] == 1
    assert {"prefill int4", "decode int8", "answers int8"} <= set(record["bars"])
