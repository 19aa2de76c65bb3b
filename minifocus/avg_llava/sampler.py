"""AVG-LLaVA behind the hook before the language model: the router chooses a granularity, the scaler gives its tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F

from .. import arguments
from ..errors import InputError
from ..loading.config import Config
from ..samplers.hooks import BeforeLLM, PictureFeatures, VisualTokens, Words
from .router import Router, filter_text
from .scaler import all_granularities, check_grid, pool_views, scale, window_of


@dataclass(frozen=True)
class RouterOptions:
    """What a router is trained with, and is of no use without.

    granularities  tokens of a view to choose from, coarse to fine; None: all that the view's grid has of the paper's five
    filtered_text  words that the router sees: 32 in the paper
    attention      between "tokens" (the paper) or "views" (the public code), see `Router`
    text           the words to filter: those of the "question", of the whole "prompt", as the public code does, or of "nothing":
                   the router then sees the picture alone (Table 4c)
    crop           of the coarse map: "whole", or "released", the public code's, which loses part of it, see `scale`
    """

    granularities: tuple[int, ...] | None = None
    filtered_text: int = 32
    attention: Literal["tokens", "views"] = "tokens"
    text: Literal["question", "prompt", "nothing"] = "question"
    crop: Literal["whole", "released"] = "whole"

    def __post_init__(self) -> None:
        given = self.granularities
        arguments.settle(
            self,
            granularities=None if given is None else arguments.whole_numbers("granularities", given, 1),
            filtered_text=arguments.whole("filtered_text", self.filtered_text, 1, 4096),
            attention=arguments.choice("attention", self.attention, ("tokens", "views")),
            text=arguments.choice("text", self.text, ("question", "prompt", "nothing")),
            crop=arguments.choice("crop", self.crop, ("whole", "released")),
        )

    def of_grid(self, config: Config) -> tuple[int, ...]:
        """The granularities for a model. Raises InputError for one that its views do not have, and for an order that falls."""
        check_grid(config.grid)
        found = all_granularities(config.grid) if self.granularities is None else self.granularities
        for tokens in found:
            window_of("granularities", tokens, config.grid)
        if list(found) != sorted(set(found)) or not found:
            raise InputError(f"granularities: expected them from coarse to fine, each once, got {found}")
        return found


class AVGLLaVA(BeforeLLM):
    """
    options  see `RouterOptions`
    router   None where the granularity is forced
    forced   the number of the granularity that all pictures get; None: the router chooses for each
    """

    def __init__(self, options: RouterOptions, config: Config, router: Router | None, forced: int | None = None):
        super().__init__()
        self.options, self.config, self.router, self.forced = options, config, router, forced
        self.granularities = options.of_grid(config)
        self.windows = [window_of("granularities", tokens, config.grid) for tokens in self.granularities]

    def all_tokens(self, views: torch.Tensor) -> torch.Tensor:
        """The views' maps [T, rows, columns, C] at all granularities, coarse to fine, as the router reads them: [T, N, C]."""
        return torch.cat([pool_views(views, window).flatten(1, 2) for window in self.windows], dim=1)

    def filtered(self, views: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Of a prompt's words [W, C], those that the router reads: [filtered_text, C]."""
        return filter_text(views[0].flatten(0, 1), words, self.options.filtered_text)

    def route(self, views: torch.Tensor, words: list[torch.Tensor]) -> torch.Tensor:
        """The logits of every granularity [Q, choices], for Q prompts about one picture, each with its own words [W, C]."""
        assert self.router is not None
        return self.router(self.all_tokens(views), torch.stack([self.filtered(views, own) for own in words]))

    def forward(self, picture: PictureFeatures, text: Words) -> VisualTokens:
        """`choice` [1, 1] of what this gives is the number of the granularity, from the coarsest.

        In training the choice is drawn, and its probability's gradient goes through the tokens (Gumbel-Softmax, straight
        through): the way that the paper compares its own with (Table 4e).
        """
        number, factor = self.forced, None
        if number is None:
            words = {"question": text.question, "prompt": text.prompt, "nothing": text.prompt[:0]}[self.options.text]
            logits = self.route(picture.views, [words])[0]
            if self.training:
                drawn = F.gumbel_softmax(logits.float(), hard=True)
                number = int(drawn.argmax())
                factor = drawn[number]
            else:
                number = int(logits.argmax())
        visual = scale(picture, self.windows[number], self.config, self.options.crop)
        tokens = visual.tokens if factor is None else visual.tokens * factor.to(visual.tokens.dtype)
        choice = torch.full((1, 1), number, dtype=torch.int64, device=visual.source.device)
        return replace(visual, tokens=tokens, choice=choice)


def new_router(options: RouterOptions, config: Config) -> Router:
    """A router with random weights, by torch's generator."""
    granularities = options.of_grid(config)
    slots = sum(granularities) + options.filtered_text
    return Router(config.text.hidden_size, slots, len(granularities), options.attention)
