"""What the tests of training share: random models and drawn data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import build, save
from random_examples import random_selector
from training_runs import write_data

from minifocus.samplers.selector_file import save_selector
from minifocus.samplers.vision_guided import VisionGuidedOptions


@pytest.fixture(scope="session", params=["llava", "llava_next"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model without a tokenizer, and beside it a selector that gives different regions different scales."""
    folder = save(build(request.param, seed=1), tmp_path_factory.mktemp(request.param))
    save_selector(folder / "selector.safetensors", random_selector(16, 3), VisionGuidedOptions())
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), text_only=2)
