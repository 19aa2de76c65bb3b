"""What training takes of a GPU: the table on the page, and the shares it counts, against FSDP2's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.training_memory import DECODERS, count, model_of, needs, table
from minifocus.loading.weights import shapes_of

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2, "vocab_size": 32111}


def test_the_page_has_the_table() -> None:
    assert table([1, 2, 4, 8], 4096, 5) in (ROOT / "docs/training.md").read_text(encoding="utf-8")


def test_shares_are_those_of_fsdp() -> None:
    """Of the process that has most, for rows that cannot be shared out evenly, and for more processes than rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for processes in (1, 7, 128):
        model = model_of(SMALL)
        expected = count(shapes_of(model).values(), processes)
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
        try:
            fully_shard(model, mesh=init_device_mesh("cpu", (processes,)))
            assert sum(p.to_local().numel() for p in model.parameters()) == expected  # type: ignore[attr-defined]
        finally:
            torch.distributed.destroy_process_group()


def test_what_lasts_is_shared_and_what_is_gathered_is_not() -> None:
    model = model_of(DECODERS["7B (Vicuna)"])
    parameters = count(shapes_of(model).values())
    assert parameters == pytest.approx(7.06e9, rel=1e-3)  # as llava-v1.6-vicuna-7b is said to have
    one, eight = (needs(model, number, 4096, 5, sharded=True) for number in (1, 8))
    assert one.lasting == 16 * parameters and eight.lasting == pytest.approx(2 * parameters, rel=1e-4)
    assert one.gathered == eight.gathered and one.activations == eight.activations
    plain = needs(model, 8, 4096, 5, sharded=False)
    assert plain.lasting == one.lasting and plain.gathered == 2 * parameters
