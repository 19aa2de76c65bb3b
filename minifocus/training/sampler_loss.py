"""The losses of what samplers learn, beside the answers' cross-entropy: FocusLLaVA's balance loss (paper §3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch

import torch
import torch.nn.functional as F

from ..errors import InputError
from ..samplers.hooks import BeforeLLM, VisualTokens
from ..samplers.vision_guided import VisionGuidedSampler


@dataclass(frozen=True)
class Balance:
    """
    alpha    the balance loss' factor (Eq. 3)
    weights  one per scale, coarse to fine (Eq. 10); None: all the same
    """

    alpha: float
    weights: tuple[float, ...] | None = None

    def weights_of(self, scales: int) -> torch.Tensor | None:
        """The weights, made to sum to the number of scales. Raises InputError where that is another than theirs."""
        if self.weights is None:
            return None
        if len(self.weights) != scales:
            raise InputError(f"scale_weights: expected {scales}, one per scale, got {len(self.weights)}")
        total = sum(self.weights)  # in double precision, where large weights do not overflow
        return torch.tensor([one / total * scales for one in self.weights], dtype=torch.float32)


def balance_loss(logits: torch.Tensor, alpha: float = 0.1, weights: torch.Tensor | None = None) -> torch.Tensor:
    """α Σ_s w_s f_s P_s (Eq. 3 to 5; with weights, which sum to S, Eq. 10) over the logits [R, S] of a micro-batch.

    f_s is the share of regions whose largest logit is s, P_s the mean probability of s.
    """
    branches = logits.shape[-1]
    share = F.one_hot(logits.argmax(dim=-1), branches).float().mean(dim=0)
    probability = logits.softmax(dim=-1).mean(dim=0)
    weights = torch.ones_like(probability) if weights is None else weights
    return alpha * (weights * share * probability).sum()


@singledispatch
def check_sampler(sampler: BeforeLLM | None, balance: Balance) -> None:
    """Raise InputError where a sampler cannot be trained so."""


@check_sampler.register
def _(sampler: VisionGuidedSampler, balance: Balance) -> None:
    balance.weights_of(len(sampler.pools))


@singledispatch
def sampler_loss(
    sampler: BeforeLLM | None, pictures: Sequence[Sequence[VisualTokens]], balance: Balance
) -> tuple[torch.Tensor | float, dict[str, float]]:
    """A micro-batch's loss of what a sampler learns, and figures to report; `pictures` as they entered the decoder, per example.

    A sampler that learns by the answers' loss alone has none.
    """
    return 0.0, {}


@sampler_loss.register
def _(
    sampler: VisionGuidedSampler, pictures: Sequence[Sequence[VisualTokens]], balance: Balance
) -> tuple[torch.Tensor | float, dict[str, float]]:
    # Where no picture was pooled, the selector's gradient is 0 and not absent, so that its optimiser still takes a step.
    nothing = 0.0 * sum(p.float().sum() for p in sampler.parameters() if p.requires_grad)
    logits = [visual.logits for own in pictures for visual in own if visual.logits is not None and len(visual.logits)]
    if not logits:
        return nothing, {}
    scores = torch.cat(logits).float()
    weights = balance.weights_of(len(sampler.pools))
    loss = balance_loss(scores, balance.alpha, None if weights is None else weights.to(scores.device))
    shares = F.one_hot(scores.argmax(-1), scores.shape[1]).float().mean(0).tolist()
    figures = {"balance_loss": float(loss.detach())}
    for (down, across), share in zip(sampler.pools, shares, strict=True):
        figures[f"scale_{down}x{across}"] = share
    return nothing + loss, figures
