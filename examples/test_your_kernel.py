"""How to test a kernel of your own with minifocus.testing: `pytest examples/test_your_kernel.py`.

The kernel here is ten lines of PyTorch; yours may be Triton, CUDA or anything that takes tensors and returns them.
"""

import itertools

import pytest
import torch
from hypothesis import given

from minifocus.testing import Attention, attentions, check_importance, register_profiles

register_profiles()  # 300 examples, always the same; MINIFOCUS_HYPOTHESIS=long: 3000 new ones


def my_importance(q, k, cu_text, cu_visual, scale):
    """minifocus.ops.reference.importance in another way: all products of an item in one einsum, grouped by key head."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(wide).unflatten(1, (k.shape[1], -1))  # [text, key heads, query heads of each, D]
    scores = torch.zeros(len(k), dtype=wide)
    items = zip(itertools.pairwise(cu_text.tolist()), itertools.pairwise(cu_visual.tolist()), strict=True)
    for (t0, t1), (v0, v1) in items:
        if t0 < t1 and v0 < v1:
            logits = torch.einsum("tkgd,nkd->tkgn", grouped[t0:t1] * scale, k[v0:v1].to(wide))
            scores[v0:v1] = logits.softmax(dim=-1).amax(dim=(1, 2)).mean(dim=0)
    return scores


@given(attentions())
def test_my_importance(drawn: Attention) -> None:
    arguments = drawn.arguments()  # drawn.arguments("cuda") for a kernel that runs there
    check_importance(my_importance(*arguments), *arguments)


def test_what_happens_when_it_is_wrong() -> None:
    """Query heads given to the wrong key heads: hypothesis finds it and shrinks it to a case that can be followed by hand."""

    @given(attentions(most=3000))
    def broken(drawn: Attention) -> None:
        q, k, *rest = drawn.arguments()
        groups = q.shape[1] // k.shape[1]
        q = q.unflatten(1, (groups, k.shape[1])).transpose(1, 2).flatten(1, 2)
        check_importance(my_importance(q, k, *rest), *drawn.arguments())

    with pytest.raises(AssertionError, match="scores of item"):
        broken()
