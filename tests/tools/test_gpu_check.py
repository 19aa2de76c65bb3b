"""gpu_check without a GPU: that it says so, and with other commands for its steps what it makes of them."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from threading import Timer, main_thread

import forked
import pytest
import torch

from experiments import operators, record
from experiments.kernels import gpu_check

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which it would run for minutes")
@pytest.mark.parametrize("program", ["kernels.gpu_check --out", "attention_lengths"])
def test_it_says_that_there_is_no_gpu(program: str, tmp_path: Path) -> None:
    name, *flag = program.split()
    done = forked.python("-m", f"experiments.{name}", *flag, *([tmp_path / "out"] if flag else []))
    assert done.returncode == 3
    assert "torch sees no GPU" in done.stderr and not (tmp_path / "out").exists()


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def check(
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: list[tuple[str, list[str], int]],
    run: Callable[[Path], int] = lambda _: gpu_check.main(),
) -> tuple[int, dict]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(out)])
    monkeypatch.delenv("MINIFOCUS_BACKEND", raising=False)  # which it takes out

    def made(capability: tuple[int, int], out: Path, scratch: Path) -> list[tuple[str, list[str], dict[str, str], int]]:
        extra = {"SCRATCH": str(scratch)}
        return [(name, command, {"STEP": name, **extra}, limit) for name, command, limit in steps]

    monkeypatch.setattr(gpu_check, "steps", made)
    code = run(out)
    return code, json.loads((out / "gpu_check.json").read_text())


def test_every_step_is_reported_whatever_became_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails, hangs with a child, prints what is no JSON last or cannot be started keeps no other from running."""
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    orphan = tmp_path / "orphan"
    hangs = f"""
import subprocess, sys, time
print("half a line", end="")
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(4); open({str(orphan)!r}, 'w')"])
time.sleep(60)"""
    trains = """
import json, os, pathlib
folder = pathlib.Path(os.environ["SCRATCH"], "training")
folder.mkdir()
(folder / "log.jsonl").write_text('{"step": 1, "loss": 2.5}\\n{"step": 2, "loss": 1.5}\\n{"step": 3, "lo')"""
    measures = f"""
import json, sys
open({str(tmp_path / "operators_cuda.json")!r}, "w").write(json.dumps({{"cases": [1, 2]}}))
print("the second case failed", file=sys.stderr)
sys.exit(1)"""
    steps = [
        ("build", python("import os; print(os.environ['STEP'], os.environ['PYTHONPATH'])"), 60),
        ("tests", python("print('3 failed'); raise SystemExit(1)"), 60),
        ("properties", python(hangs), 2),
        ("benchmark", python(measures), 60),
        ("benchmark_without_tensor_cores", python("print('no cases')"), 60),
        ("training", python(trains), 60),
        ("memcheck", [str(tmp_path / "no such program")], 60),
    ]
    (tmp_path / "operators_cuda_without_tensor_cores.json").write_text('{"cases": ["of another run"]}')
    begun = time.monotonic()
    code, report = check(tmp_path, monkeypatch, steps)
    assert code == 1 and time.monotonic() - begun < 50
    found = report["steps"]
    assert [found[name]["passed"] for name, *_ in steps] == [True, False, False, False, True, True, False]
    assert found["build"]["last_line"] == f"build {ROOT}{os.pathsep}/elsewhere"
    assert (found["tests"]["exit"], found["properties"]["exit"]) == (1, "took more than 2 s")
    assert (found["benchmark"]["cases"], found["benchmark"]["last_line"]) == ([1, 2], "the second case failed")
    assert "cases" not in found["benchmark_without_tensor_cores"]
    assert found["training"]["losses"] == [2.5, 1.5]
    assert "No such file" in found["memcheck"]["exit"]
    assert report["device"] == "a GPU" and report["commit"]
    log = (tmp_path / "gpu_check.log").read_text()
    assert "half a line" in log and "3 failed" in log
    time.sleep(max(0.0, 5 - (time.monotonic() - begun)))
    assert not orphan.exists()


def test_what_is_not_timed_runs_side_by_side_and_what_is_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the first two waits for the other to have begun; a benchmark, for both to have ended."""

    def waits(own: str, other: str) -> list[str]:
        here = f"import pathlib, time; here = pathlib.Path({str(tmp_path)!r}); (here / {own!r}).touch()\n"
        return python(
            f"{here}while not (here / {other!r}).exists(): time.sleep(0.05)\n(here / ('ended ' + {own!r})).touch()"
        )

    alone = python(f"import os; there = os.listdir({str(tmp_path)!r}); assert {{'ended a', 'ended b'}} <= set(there)")
    steps = [("build", python(""), 60), ("benchmark", alone, 60), ("tests", waits("a", "b"), 20)]
    code, report = check(tmp_path, monkeypatch, [*steps, ("training", waits("b", "a"), 20)])
    assert code == 0 and list(report["steps"]) == ["build", "benchmark", "tests", "training"]


def test_ctrl_c_ends_what_runs_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, orphan = time.monotonic(), tmp_path / "orphan"
    code = f"import time; time.sleep(8); open({str(orphan)!r}, 'w')"
    steps = [("build", python(""), 60), ("tests", python(code), 60), ("training", python(code), 60)]
    Timer(3, signal.pthread_kill, (main_thread().ident, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        check(tmp_path, monkeypatch, steps, gpu_check.check)
    assert time.monotonic() - begun < 7 and not gpu_check.RUNNING
    time.sleep(max(0.0, 9 - (time.monotonic() - begun)))
    assert not orphan.exists()


def test_what_cannot_be_read_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torn = f"open({str(tmp_path / 'operators_cuda.json')!r}, 'w').write('{{\"cases\": [1')"
    code, report = check(tmp_path, monkeypatch, [("build", python(""), 60), ("benchmark", python(torn), 60)])
    assert code == 0 and report["steps"]["benchmark"]["unreadable"].startswith("operators_cuda.json: ")


def test_a_peer_that_fails_is_named_and_the_others_are_measured() -> None:

    def fails() -> None:
        raise RuntimeError("no compiler")

    case = operators.Case(
        "toy", "none", bytes=1, runs={"minifocus": lambda: None, "compiled": fails, "copy": lambda: None}
    )
    result = operators.measure(case, operators.Clock("cpu"), 1)
    assert result["failed"] == {"compiled": "RuntimeError: no compiler"} and set(result["seconds"]) == {
        "minifocus",
        "copy",
    }
    with pytest.raises(RuntimeError, match="no compiler"):
        operators.measure(operators.Case("toy", "none", bytes=1, runs={"minifocus": fails}), operators.Clock("cpu"), 1)


def test_without_a_build_nothing_else_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, report = check(tmp_path, monkeypatch, [("build", python("1 / 0"), 60), ("tests", python(""), 60)])
    assert code == 1 and list(report["steps"]) == ["build"]
    assert report["steps"]["build"]["last_line"] == "ZeroDivisionError: division by zero"


def test_the_steps_fit_into_ten_minutes_and_name_what_is_there(tmp_path: Path) -> None:
    steps = gpu_check.steps((9, 0), tmp_path, tmp_path)
    limits = {name: limit for name, *_, limit in steps}
    alone = ["build", *gpu_check.RESULTS]
    beside = max(limit for name, limit in limits.items() if name not in alone)
    assert sum(limits[name] for name in alone) + beside <= 600
    for _, command, _, _ in steps:
        for word in command:
            if word.startswith(("tests/", "examples/")):
                assert (ROOT / word).is_file()
            if word.startswith(("experiments.", "csrc.")):
                assert find_spec(word) is not None
    compile(gpu_check.SANITIZED, "SANITIZED", "exec")


def test_a_copy_of_a_checkout_is_named_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert record.environment(ROOT / "setup.py")["commit"] != "abc"
    monkeypatch.setenv("MINIFOCUS_COMMIT", "abc")  # the copy may have a .git of its own
    found = record.environment(ROOT / "setup.py")
    assert (found["commit"], found["dirty"]) == ("abc", None)
    monkeypatch.setenv("PATH", str(tmp_path))  # git itself is not there
    assert record.environment(ROOT / "setup.py")["commit"] == "abc"
    assert record.commit() == "none"
