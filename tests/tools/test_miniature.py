"""`make weights` at two steps a stage, and the record of the run that made the committed weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from forked import python

import minifocus
from examples import command_line
from experiments.miniature import make, vision, warmup
from minifocus import cards
from minifocus.cards.feature_map import GRID, PATCH
from minifocus.inputs.conversations import Turn
from minifocus.inputs.tokenizer import Tokenizer
from minifocus.training.log import read_log

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ROOT / "weights/training"
STAGES = ("vision", "warmup", "full", "focus", "router")


def test_every_stage_runs_and_leaves_what_the_next_one_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each stage is a program, as in a long run, but forked after the imports."""

    def stage(command: list[str], cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        assert command[0] == sys.executable
        done = python(*command[1:], cwd=cwd)
        print(done.stderr, file=sys.stderr)
        return done

    places = [f"--{name}={tmp_path / name}" for name in ("runs", "output", "record")]
    monkeypatch.setattr(sys, "argv", ["make", "--quick", "--processes", "1", *places])
    monkeypatch.setattr(command_line, "call", stage)
    monkeypatch.setattr(make, "BATCH", 6)  # as many as are learned from at once
    assert make.main() == 0, capsys.readouterr().err
    made = {file.name for file in (tmp_path / "output").iterdir()}
    assert made == {file.name for file in (ROOT / "weights/tiny").iterdir()}
    for name in ("tokenizer.json", "tokenizer.model", "config.json"):  # which no training changes
        assert (tmp_path / "output" / name).read_bytes() == (ROOT / "weights/tiny" / name).read_bytes(), name
    for stage in STAGES:
        assert [line["step"] for line in read_log(tmp_path / "record" / f"{stage}.jsonl")][-1] == 2
    model = minifocus.load(tmp_path / "output", "focus")
    assert model.generate(cards.draw(5).image, "Is there a red card?", max_new_tokens=2).tokens.full > 64
    model.set_sampler("avg-llava")
    assert model.generate(cards.draw(5).image, "Is there a red card?", max_new_tokens=2).pictures[0].choice is not None


def test_patches_say_what_they_show() -> None:
    """A whole scene as one view: the patch with a glyph's middle has its letter and place, a bar its height, a thing its name."""
    heads, seen = list(vision.HEADS), set()
    for seed in range(300):
        scene = cards.draw(seed, size=(cards.TILE, cards.TILE))
        labels, present = vision.view_labels(scene.objects, vision.View((1, 1), (0, 0), whole=False))
        labels = {head: labels[:, i].reshape(GRID, GRID) for i, head in enumerate(heads)}
        patches = [
            (thing, i, ((y0 + y1) // 2 // PATCH, (x0 + x1) // 2 // PATCH))
            for thing in scene.objects
            for i, (x0, y0, x1, y1) in enumerate(thing.glyphs)
        ]
        for thing, i, patch in patches:
            if sum(other == patch for _, _, other in patches) == 1 and labels["glyph"][patch] != vision.UNASKED:
                assert vision.GLYPHS[labels["glyph"][patch] - 1] == thing.text[i]
                assert vision.SLOTS[labels["slot"][patch] - 1] == (len(thing.text), i)
                assert labels["kind"][patch] == 1 + cards.KINDS.index(thing.kind)
                seen.add(thing.text[i])
        bars = sorted((o for o in scene.objects if o.kind == "bar"), key=lambda bar: bar.box[3] - bar.box[1])
        if bars:
            seen.add("bars")
            foot = (bars[0].box[3] - 5) // PATCH
            heights = [labels["height"][foot, (bar.box[0] + bar.box[2]) // 2 // PATCH] for bar in bars]
            colours = [labels["colour"][foot, (bar.box[0] + bar.box[2]) // 2 // PATCH] for bar in bars]
            own = [1 + list(cards.COLOURS).index(bar.colour) for bar in bars]
            shown = [height for height, a, b in zip(heights, colours, own, strict=True) if a == b]
            assert shown == sorted(set(shown)) and 0 not in shown  # each taller one has a class of its own
        for thing in scene.objects:
            assert present[:, vision.NAMES.index((thing.kind, thing.colour))].any()
    assert seen == {*vision.GLYPHS, "bars"}


def test_gazes_are_at_what_the_next_character_is() -> None:
    """For every character of an answer that is read, the token before is shown that character's place, and no other."""
    tokenizer = Tokenizer.from_folder(ROOT / "weights/tiny")
    image = tokenizer.token_id("<image>")
    assert image is not None
    read = 0
    for seed in range(60):
        scene = cards.draw(seed)
        for q in scene.questions:
            wanted = warmup.gazes(Turn(q.question, q.answer, q.family), scene.objects, tokenizer, image)
            text = f"USER: <image>\n{q.question} ASSISTANT: {q.answer}"
            encoded = tokenizer.encode(text)
            after = [text[begin:end] for begin, end in encoded.offsets[encoded.ids.index(image) + 1 :]]
            for gaze in (one for one in wanted if one.glyph is not None):
                (thing,) = gaze.things
                token = after[gaze.token + 1] if gaze.answering else after[gaze.token]
                assert token.strip()[-1] == scene.objects[thing].text[gaze.glyph]
            if q.family == "read":
                answering = [one for one in wanted if one.answering and one.glyph is not None]
                places = [one.glyph for one in answering]
                assert places[-1] == len(q.answer) - 1 and places == sorted(set(places))
                assert all(scene.objects[one.things[0]].text == q.answer for one in answering)
                read += 1
    assert read > 60


def test_the_committed_weights_come_with_their_record() -> None:
    record = json.loads((TRAINING / "record.json").read_text())
    made_by = ("python -m experiments.miniature.make", "python weights/make_tiny.py")  # the latter until it was moved
    assert record["command"].startswith(made_by) and "--quick" not in record["command"]
    assert record["commit"] and set(record["seconds"]) == {"files", *STAGES}
    for stage in STAGES:
        assert read_log(TRAINING / f"{stage}.jsonl")[-1]["step"] == record["steps"][stage]
        assert (TRAINING / f"{stage}.png").stat().st_size > 1000
