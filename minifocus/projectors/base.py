"""What a projector is: it turns a view's patch features into tokens of the language model (paper §3.1), perhaps into fewer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError

LARGEST_LAYER = 2**30  # numbers in one weight of a projector that config.json describes


@dataclass(frozen=True)
class Ends:
    """What a projector stands between.

    side    patches along a side of a view
    width   channels C of the vision tower
    states  hidden states of it that are joined along channels
    hidden  channels D of the decoder
    """

    side: int
    width: int
    states: int
    hidden: int


class Grid(NamedTuple):
    """The tokens of a view, in raster order.

    together  tokens of a row that stand for one window, and are never parted
    window    patches of the tower along a side of a window
    """

    rows: int
    columns: int
    together: int = 1
    window: int = 1

    @property
    def cells(self) -> int:
        return self.rows * self.columns

    @property
    def windows_across(self) -> int:
        return self.columns // self.together


class Projector(nn.Module, ABC):
    """A view's features [N, side² (+ 1 with a kept class token), C · states] → [N, rows · columns (+ 1), D]: see `Grid`."""

    @abstractmethod
    def forward(self, features: torch.Tensor) -> torch.Tensor: ...

    def reset_parameters(self) -> None:
        """New random values, from torch's generator."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and callable(reset):
                reset()

    def begin_as_pooling(self, old: Projector, states: Sequence[int]) -> None:
        """Take values with which a token is the mean of those that `old`, LLaVA's MLP, makes of its window's patches.

        `states` says which of the joined hidden states `old` read, in its order. Raises InputError where that cannot be.
        """
        raise InputError(f"start: {type(self).__name__} cannot begin as pooling: expected a random start")


@dataclass(frozen=True)
class ProjectorOptions(ABC):
    """What config.json's `projector` says beside a name. A field that is out of range raises InputError."""

    @abstractmethod
    def grid(self, ends: Ends) -> Grid:
        """The tokens of a view. Raises InputError where the options do not fit `ends`."""

    @abstractmethod
    def build(self, ends: Ends) -> Projector:
        """The projector, with new random values."""

    def pool_cues(self, cues: torch.Tensor, ends: Ends) -> torch.Tensor:
        """What a sampler took from the tower of each patch [N, side², K] → of each token [N, rows · columns, K].

        The tokens of a window get the mean of its patches.
        """
        grid = self.grid(ends)
        if grid.windows_across == ends.side:
            return cues
        planes = cues.unflatten(1, (ends.side, ends.side)).permute(0, 3, 1, 2)
        pooled = F.avg_pool2d(planes, ends.side // grid.rows).repeat_interleave(grid.together, dim=3)
        return pooled.reshape(*pooled.shape[:2], grid.cells).transpose(1, 2)


def windows(side: int, window: int, name: str = "window") -> int:
    """How many windows of `window` patches are along a view's side. Raises InputError where they do not cover it.

    `name` is that of the option.
    """
    if side % window:
        raise InputError(f"{name}: expected a divisor of the {side} patches along a view's side, got {window}")
    return side // window
