"""`make weights` at two steps a stage, and the record of the run that made the committed weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import minifocus
from minifocus import cards
from minifocus.training.log import read_log

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ROOT / "weights/training"
STAGES = ("vision", "warmup", "full", "focus")


def test_every_stage_runs_and_leaves_what_the_next_one_takes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.miniature.make", "--quick", "--processes", "1"]
    command += [f"--{name}={tmp_path / name}" for name in ("runs", "output", "record")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    made = {file.name for file in (tmp_path / "output").iterdir()}
    assert made == {file.name for file in (ROOT / "weights/tiny").iterdir()}
    for name in ("tokenizer.json", "tokenizer.model", "config.json"):  # which no training changes
        assert (tmp_path / "output" / name).read_bytes() == (ROOT / "weights/tiny" / name).read_bytes(), name
    for stage in STAGES:
        assert [line["step"] for line in read_log(tmp_path / "record" / f"{stage}.jsonl")][-1] == 2
    model = minifocus.load(tmp_path / "output", "focus")
    assert model.generate(cards.draw(5).image, "Is there a red card?", max_new_tokens=2).tokens.full > 64


def test_the_committed_weights_come_with_their_record() -> None:
    record = json.loads((TRAINING / "record.json").read_text())
    made_by = ("python -m experiments.miniature.make", "python weights/make_tiny.py")  # the latter until it was moved
    assert record["command"].startswith(made_by) and "--quick" not in record["command"]
    assert record["commit"] and set(record["seconds"]) == {"files", *STAGES}
    for stage in STAGES:
        assert read_log(TRAINING / f"{stage}.jsonl")[-1]["step"] == record["steps"][stage]
        assert (TRAINING / f"{stage}.png").stat().st_size > 1000
