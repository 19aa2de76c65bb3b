"""What the tests of projectors share: random models of both layouts, with LLaVA's own projector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import add_tokenizer, build, save


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def plain(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(build(request.param, seed=1), tmp_path_factory.mktemp(request.param))
    add_tokenizer(folder)
    return folder
