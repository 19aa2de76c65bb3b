"""Which of torch's kernels attention goes through: all but cuDNN's, which plans anew for every length it meets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_plans() -> Iterator[None]:
    """Keep scaled_dot_product_attention from cuDNN, which torch prefers on a Hopper GPU.

    An answer's next token, a picture's tokens and a batch's rows are all of lengths not met before, and on an H200 a plan
    took 30 ms where the attention itself takes 0.04 (docs/operators.md). The switch is torch's and the whole process', and
    is afterwards as it was.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
