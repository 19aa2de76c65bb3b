"""Checks an installed minifocus: its compiled operators load and agree with the reference, and the embedded model answers.

python check_installed.py SOURCES     (from another folder than SOURCES, the repository's)
"""

from __future__ import annotations

import importlib.util
import sys

import torch

import minifocus
from minifocus import ops
from minifocus.ops import reference


def main(sources: str) -> None:
    assert "site-packages" in minifocus.__file__, minifocus.__file__
    assert importlib.util.find_spec("transformers") is None, "transformers must not be a run-time dependency"

    # A CUDA build of torch loads the CUDA half too, which needs no GPU.
    backends = {"cpu": "native", "cuda": "native" if torch.version.cuda else "reference"}
    assert backends == ops.BACKENDS, ops.BACKENDS
    for name in (schema.split("(")[0] for schema in ops.backend.schemas()):
        for key in ("CPU", "CUDA") if torch.version.cuda else ("CPU",):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"minifocus::{name}", key), (name, key)

    torch.manual_seed(0)
    grid_hw = torch.tensor([[7, 5], [2, 2]])  # two pictures: four regions, three of them ragged, and one
    x = torch.randn(39, 16, requires_grad=True)
    regions = (4, [(1, 1), (2, 2), (4, 4)])
    text, visual = torch.tensor([0, 3, 5]), torch.tensor([0, 20, 26])
    calls = {
        "region_pool": (x, grid_hw, torch.tensor([0, 1, 2, 0, 1]), *regions),
        "region_route": (x.detach(), grid_hw, torch.randn(2, 3, 16), torch.randn(3), *regions),
        "importance": (torch.randn(5, 4, 8), torch.randn(26, 2, 8), text, visual, 0.3),
        "select_top_p": (torch.rand(26), visual, 0.8),
        "gather_tokens": ([torch.randn(26, 8), torch.arange(26)], torch.tensor([3, -1, 20])),
    }
    for name, arguments in calls.items():
        got, expected = (getattr(backend, name)(*arguments) for backend in (ops, reference))
        torch.testing.assert_close(got, expected, msg=lambda text, name=name: f"{name}: {text}")
        if name == "region_pool":
            gradients = [torch.autograd.grad(tokens.square().sum(), x) for tokens in (got[0], expected[0])]
            torch.testing.assert_close(*gradients)

    answer = minifocus.load(f"{sources}/weights/tiny").generate(
        f"{sources}/examples/cards.png", "What number is on the red card?"
    )
    assert answer.text, answer
    print(
        f"installed in torch {torch.__version__}, Python {sys.version.split()[0]}: operators {ops.BACKENDS}; the embedded model"
        f" answers {answer.text!r}, reading {answer.tokens.equivalent:.0%} of the visual tokens"
    )


if __name__ == "__main__":
    main(sys.argv[1])
