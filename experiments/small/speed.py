"""Speed of the methods at one budget, alone and in a batch: ratios to `none`, every method in turn in each round."""

from __future__ import annotations

from typing import Any

import minifocus

from ..compare import Models, measure, methods_for, settings_of
from .photographs import photographs, pieces

BUDGET = 0.39  # the paper's tokens for its default (§4.4)


def ordered_methods() -> list[str]:
    """Those of the registry that need no router, in its order, each once."""
    return [name for name in minifocus.methods.names() if name in methods_for(None)]


def time_methods(
    model: minifocus.Llava, methods: list[str], batched: list[str], batch: int, rounds: tuple[int, int], small: bool
) -> dict[str, Any]:
    """
    alone    figures of `none` and of `methods` for one question, which is another photograph's in every round
    batch    of `none` and those of `batched` that are in `methods`, for `batch` pieces of photographs at once

    alone_watched, batch_watched  how many rounds were disturbed and run again (timing.py)

    `rounds` are of the one and of the other. Options are searched for on the first photograph. "focus" and "vision" have the
    stand-in for a trained selector, which the folder lacks. `small`: pieces instead of whole photographs, few new tokens.
    """
    asked = pieces(3) if small else photographs(3)
    new_tokens = 4 if small else 16
    settings = settings_of(model, methods, (BUDGET,), asked[:1], {"selector": "variance"})
    alone = [[asked[number % len(asked)]] for number in range(rounds[0])]
    models = Models(model, {})
    # The search has warmed all up.
    together = [one for one in settings if one.method == "none" or one.method in batched]
    alone_figures, alone_watched = measure(models, settings, alone, new_tokens, warm_up=False, all_of_them=True)
    batches = [pieces(batch)] * rounds[1]
    batch_figures, batch_watched = measure(models, together, batches, new_tokens, warm_up=False, all_of_them=True)
    return {
        "budget": BUDGET,
        "rounds": list(rounds),
        "batch_size": batch,
        "new_tokens": new_tokens,
        "alone": alone_figures,
        "alone_watched": alone_watched,
        "batch": batch_figures,
        "batch_watched": batch_watched,
    }
