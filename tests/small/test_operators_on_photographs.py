"""The samplers' operators on features, queries and keys of a photograph, not on random numbers.

Their channels differ in size by far, neighbours are alike, and softmax has a few large values. What is checked is the operator
that is used here, compiled or not; minifocus.testing checks it against the rule.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from PIL import Image

import minifocus
from minifocus.methods.tower_attention import queries_and_keys
from minifocus.ops import reference
from minifocus.ops.backend import flat
from minifocus.samplers.vision_guided import pools_for
from minifocus.testing import check_gather, check_importance, check_region_pool, check_region_route, check_selection

Load = Callable[..., minifocus.Llava]
OPERATORS = torch.ops.minifocus
BLOCK = 10
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(scope="module")
def states(load: Load, photographs: list[Image.Image]) -> torch.Tensor:
    """[2, 257, 384], the input of the tower's block BLOCK for two photographs."""
    model = load("llava")
    tiles = torch.cat([model.image_processor(photograph)[0].flatten(0, -4) for photograph in photographs[2:4]])
    with torch.inference_mode():
        found = model.vision_tower(tiles, [BLOCK])[BLOCK].clone()
    sizes = found.abs().amax(dim=(0, 1))
    assert sizes.max() > 5 * sizes.median()
    return found


@both_dtypes
@pytest.mark.parametrize("window", [2, 4])
def test_pooling_and_routing(states: torch.Tensor, dtype: torch.dtype, window: int) -> None:
    """Maps of 16 × 16 and, the last rows and columns cut off, 13 × 15."""
    maps = states[:, 1:].unflatten(1, (16, 16))
    grid_hw = torch.tensor([[16, 16], [13, 15]])
    x = torch.cat([maps[0].flatten(0, 1), maps[1, :13, :15].flatten(0, 1)]).to(dtype)
    pools = pools_for(window, 3)
    regions = sum(-(-height // window) * -(-width // window) for height, width in grid_hw.tolist())
    choice = torch.arange(regions) % len(pools)
    arguments = (x, grid_hw, choice, window, flat(pools), None)
    check_region_pool(OPERATORS.region_pool(*arguments), *arguments)
    # A selector that looks at what differs between the maps: its logits are near each other for alike regions.
    context = torch.stack([x[:256].float().mean(0), x[256:].float().mean(0), x.float().std(0)])[: len(pools)] / 384
    route = (x, grid_hw, torch.stack([context, context.flip(0)]), torch.zeros(len(pools)), window, flat(pools))
    got = OPERATORS.region_route(*route)
    check_region_route(got, *route)
    assert len(got[3].unique()) > 1


@both_dtypes
@torch.inference_mode()
def test_importance_selection_and_gathering(load: Load, states: torch.Tensor, dtype: torch.dtype) -> None:
    """The class token and some patches ask, all patches are asked; two photographs of different lengths."""
    block = load("llava").vision_tower.encoder.layers[BLOCK]
    q, k = (one.transpose(1, 2).to(dtype) for one in queries_and_keys(block, states, slice(0, 9)))
    q = torch.cat([q[0], q[1, :5]]).contiguous()  # [T, H, D], scaled already
    k = torch.cat([k[0, 1:], k[1, 1:200]]).contiguous()
    cu_text, cu_visual = torch.tensor([0, 9, 14]), torch.tensor([0, 256, 455])
    scores = OPERATORS.importance(q, k, cu_text, cu_visual, 1.0)
    check_importance(scores, q, k, cu_text, cu_visual, 1.0)
    assert scores.max() > 10 * scores.median()  # as attention is
    for gamma, keep in ((0.5, None), (0.9, None), (0.0, 64)):
        index, count = OPERATORS.select_top_p(scores, cu_visual, gamma, keep)
        check_selection((index, count), scores, cu_visual, gamma, keep)
        kept = torch.cat([own[:n] for own, n in zip(index.split([256, 199]), count.tolist(), strict=True)])
        columns = [torch.cat([states[0, 1:], states[1, 1:200]]).to(dtype), torch.arange(455)]
        check_gather(OPERATORS.gather_tokens(columns, kept), columns, kept)
        if keep is None:  # the fewest that hold the share gamma
            for own, n in zip(scores.split([256, 199]), count.tolist(), strict=True):
                largest = own.sort(descending=True).values.double()
                assert largest[:n].sum() >= gamma * largest.sum() * (1 - 1e-5)
                assert largest[: n - 1].sum() <= gamma * largest.sum() * (1 + 1e-5)
    assert reference.select_top_p(scores, cu_visual, 0.5, None)[1].max() < 128  # half of the attention is on few
