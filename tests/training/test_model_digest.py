"""A digest says which model a run began from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minifocus.samplers.selector_file import save_selector
from minifocus.samplers.vision_guided import LinearSelector, VisionGuidedOptions
from minifocus.training.model_digest import digest_of_model

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_digest_of_a_model_is_of_its_content(tmp_path: Path) -> None:
    """Of each tensor's ends, too, where there is more than is read; not of how it is written, nor of what is not loaded."""

    def digest() -> str:
        return digest_of_model(tmp_path, blocks=2, size=8)

    small, large = torch.arange(4.0), torch.arange(100.0)
    found = set()
    for changed in ((), (small, 0), (small, 3), (large, 0), (large, 99)):
        with torch.no_grad():
            if changed:
                changed[0][changed[1]] += 1
        save_file({"small": small, "large": large}, tmp_path / "model.safetensors", {"format": "pt"})
        found.add(digest())
    assert len(found) == 5
    (tmp_path / "model.safetensors").unlink()
    save_file({"small": small}, tmp_path / "model-00001-of-00002.safetensors", {"of": "another", "writer": "this"})
    save_file({"large": large}, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = {"large": "model-00002-of-00002.safetensors", "small": "model-00001-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert digest() in found
    save_file({"small": small.view(2, 2)}, tmp_path / "model-00001-of-00002.safetensors")
    found.add(digest())
    assert len(found) == 6

    for name, contents in {
        "config.json": ('{"a": 1, "b": 2}', '{"b": 2,\n "a": 1}', '{"b": 2, "a": 3}'),
        "chat_template.jinja": ("a", "a", "b"),
        "additional_chat_templates/x.jinja": ("a", "a", "b"),
        "trainer_state.json": ("{}", "[]"),
        "README.md": ("Hello.", "Bye."),
    }.items():
        before = digest()
        (tmp_path / name).parent.mkdir(exist_ok=True)
        digests = []
        for content in contents:
            (tmp_path / name).write_text(content)
            digests.append(digest())
        assert digests[0] == digests[1]
        assert (before != digests[0] and digests[2] != digests[0]) if len(contents) == 3 else before == digests[0]
    selectors = []
    for window in (4, 4, 8):
        (tmp_path / "selector.safetensors").unlink(missing_ok=True)
        save_selector(tmp_path / "selector.safetensors", LinearSelector(16, 3), VisionGuidedOptions(window=window))
        selectors.append(digest())
    metadata = {
        "format": "minifocus-selector",
        "window": "4",
        "branches": "3",
        "score_pool": "max",
        "score_norm": "none",
    }
    file = tmp_path / "selector.safetensors"
    for _ in range(4):  # as it was written before, in random order
        save_file({"weight": torch.zeros(3, 16), "bias": torch.zeros(3)}, file, dict(metadata))
        selectors.append(digest())
    assert len(set(selectors)) == 2 and selectors[0] != selectors[2]
