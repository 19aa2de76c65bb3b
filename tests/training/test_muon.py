"""Muon in float32: its matrices are near orthogonal, and its steps those of torch.optim.Muon, which works in bfloat16."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minifocus.training.muon import Muon, orthogonalise


@given(
    st.integers(2, 40), st.integers(2, 40), st.integers(1, 4), st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 1e6])
)
@settings(max_examples=40, deadline=None)
def test_singular_values_end_near_one(rows: int, columns: int, count: int, seed: int, scale: float) -> None:
    matrices = torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    done = orthogonalise(matrices)
    assert done.shape == matrices.shape
    values = torch.einsum("nim,nij,njm->nm", u, done, v.mT)  # the same singular vectors
    well = s > 0.05 * s.amax(dim=1, keepdim=True)  # five rounds lift no value from nothing
    assert ((values[well] > 0.5) & (values[well] < 1.3)).all()


def test_zero_gradients_leave_weights_alone() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 6))
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    Muon([weight], lr=0.1).step()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16)])
def test_its_steps_are_those_of_torch(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    pair = Muon([ours], **options), torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(4):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimizer in pair:
            optimizer.step()
    moved, expected = ours - start, theirs - start
    assert (moved - expected).norm() <= 0.03 * expected.norm()  # bfloat16


def test_state_goes_on() -> None:
    whole, parts = torch.nn.Parameter(torch.eye(3, 5)), torch.nn.Parameter(torch.eye(3, 5))
    gradients = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(2))
    one = Muon([whole], lr=0.1)
    two = Muon([parts], lr=0.1)
    for number, gradient in enumerate(gradients):
        if number == 2:
            state = two.state_dict()
            two = Muon([parts], lr=0.3)
            two.load_state_dict(state)
        for parameter, optimizer in ((whole, one), (parts, two)):
            parameter.grad = gradient
            optimizer.step()
    assert torch.equal(whole, parts)
