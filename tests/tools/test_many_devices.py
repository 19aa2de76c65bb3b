"""experiments/many_devices: it measures and counts with two processes, sends what shapes say, and says what failed."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from examples.command_line import Failed
from experiments.many_devices import __main__ as program
from experiments.many_devices import report, training
from experiments.many_devices.communication import ADD, GATHER, SCATTER, TELL, sent

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def test_what_a_ring_sends() -> None:
    payload = Counter({ADD: 12.0, GATHER: 12.0, SCATTER: 12.0, TELL: 5.0})
    assert sent(payload, 1) == 0
    assert sent(payload, 4) == 2 * 9 + 9 + 9 + 5  # three of four parts, and for a sum twice


def measured(monkeypatch: pytest.MonkeyPatch, *words: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["many_devices", *map(str, words)])
    monkeypatch.setattr(program.signal, "signal", mock.Mock())  # pytest keeps its own
    try:
        return program.main()
    except SystemExit as leaving:
        return int(leaving.code or 0)


def test_what_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Answers by one process and by two, a run of train.py, and what two send, which the program compares with the shapes."""

    def by_one(model: Path, data: Path, count: int | None, steps: int) -> dict[str, Any]:
        return real(model, data, None, steps) if count is None else {"step": 2.0, "peak": 10**6}

    real = training.train  # in shares it is test_shard.py's
    monkeypatch.setattr(program, "train", by_one)
    words = ("--quick", "--processes", "2", "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    assert measured(monkeypatch, *words) == 0
    record = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    plain, two = record["answers"]["sides"].values()
    assert (plain["processes"], two["processes"]) == (1, 2)
    embeddings, whole = 32064 * 128, record["model"]["parameters"]["decoder"]
    norms = 128 * (2 * 4 + 1)
    assert plain["memory"]["decoder"] == 4 * whole
    assert two["memory"]["decoder"] == 4 * (embeddings + norms + (whole - embeddings - norms) // 2)
    for side in (plain, two):
        assert min(side["seconds"]["decode"] + side["seconds"]["prefill"]) > 0
        assert side["memory"]["peak"] > side["memory"]["imports"] > side["memory"]["decoder"]
    learned = record["training"]
    assert learned["examples"] == 4 and learned["tokens"] > 4 * 136
    assert learned["sides"]["plain"]["step"][0] > 0 and learned["sides"]["plain"]["memory"]["peak"] > 5e7
    ((small,),) = [record["sent"]]
    assert small["processes"] == 2 and set(small["what"]) == {"prompt", "prompt, text-guided", "token", "micro-batch"}
    prompt, text, token, learning = (small["what"][name]["counted"] for name in small["what"])
    assert token == {ADD: 4 * 2 * 4 * 128, GATHER: 4 * 32064}
    assert text[ADD] < prompt[ADD] and text[GATHER] > prompt[GATHER] == token[GATHER]
    assert learning[GATHER] > learning[SCATTER] > 4 * whole
    page = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert f"Made by `{record['command']}`" in page and report.tables(record) in page
    assert not list((tmp_path / "runs").iterdir())


def test_a_run_that_ends_by_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('error: no room'); print(); raise SystemExit(2)"]
    with (
        training.started(command, [{}], tmp_path) as processes,
        pytest.raises(Failed, match="^train.py: process 0 ended with status 2: error: no room$"),
    ):
        training.seconds_of_step(tmp_path, processes, 2)


def test_other_amounts_than_computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    group, other = mock.Mock(), {"computed": {ADD: 8}, "counted": {ADD: 4}}
    group.return_value.ask.side_effect = lambda what: [{"token": other}] if what == "answers" else []
    monkeypatch.setattr(program, "Group", group)
    with pytest.raises(Failed, match="token: computed {'all_reduce': 8}, got {'all_reduce': 4}"):
        program.count_sent(tmp_path, tmp_path, tmp_path, 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--processes", "2,3"], "--processes: expected some of 1,2,4, with commas between, got 2,3"),
        (["--rounds", "0"], "--rounds: expected a number of at least 1"),
        (["--steps", "1"], "--steps: expected a number of at least 2"),
    ],
)
def test_what_is_refused(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measured(monkeypatch, *words) == 2 and said in capsys.readouterr().err
