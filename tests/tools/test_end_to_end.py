"""experiments/end_to_end: the sizes of a folder of the user's, and what is refused before a process is started."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import minifocus
from experiments import end_to_end
from experiments.end_to_end_programs import FULL, Minifocus, Settings, Size

TINY = Path(__file__).resolve().parents[2] / "weights/tiny"


def test_a_folder_is_asked_about_a_picture_of_its_own_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a side sends is what the model takes: no token of the text is the placeholder, and the picture fills it."""
    config = minifocus.load(TINY, "none").config
    size = Size.of(TINY)
    assert size.picture == (2 * config.vision.image_size,) * 2 and size.image_token == config.image_token_id
    assert size.words == FULL.words and size.text["num_hidden_layers"] == config.text.num_hidden_layers
    monkeypatch.setattr(torch, "randint", lambda low, high, shape, **_: torch.full(shape, size.image_token))
    side = Minifocus(Settings(size, TINY, "float32", "cpu", 3, 0), "focus")
    assert int((side.ids == size.image_token).sum()) == size.visual_tokens
    side.load()
    found = side.run()
    assert len(found["tokens"]) == 4 and size.visual_tokens > found["visual"][0] >= found["visual"][-1]
    none = Minifocus(replace(side.settings, new_tokens=1), "none")
    none.load()
    assert none.run()["visual"] == [size.visual_tokens] * config.text.num_hidden_layers


def status(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["end_to_end", *map(str, arguments)])
    try:
        return end_to_end.main()
    except SystemExit as error:
        return int(error.code or 0)


def test_what_is_no_such_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(TINY, tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    side = config["vision_config"]["image_size"]
    (tmp_path / "other/config.json").write_text(json.dumps(config | {"image_grid_pinpoints": [[side, 2 * side]]}))
    assert status(monkeypatch, "--folder", tmp_path / "other") == 2
    assert "expected a LLaVA-NeXT that takes a picture of two by two tiles" in capsys.readouterr().err
    assert status(monkeypatch, "--folder", tmp_path / "none") == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    for option in (["--quick"], ["--checkpoint", tmp_path / "new"]):
        assert status(monkeypatch, "--folder", TINY, *option) == 2
        assert f"{option[0]}: is of the random model, not to be combined with --folder" in capsys.readouterr().err
