"""What all tests share: hypothesis' profiles, the marker of GPU tests, and a fixture for tests of many small calls."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

from minifocus import testing

testing.register_profiles()

# Where processes share the processors, threads on top would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of what tests start


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU")
    config.addinivalue_line("markers", "slow: takes longer than all the rest of its file: not a part of `make check`")


def pytest_collection_finish() -> None:
    """What was imported and collected stays: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and on a busy computer waiting for them takes ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
