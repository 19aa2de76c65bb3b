"""The loss: the answers' cross-entropy and the balance loss, with samplers that draw at random (paper §3.2, §3.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..arguments import shown
from ..errors import InputError
from ..model import LlavaNetwork
from ..samplers.text_guided import TextGuidedSampler
from .examples import Batch
from .packed import Guidance, forward
from .sampler_loss import Balance, check_sampler, sampler_loss
from .settings import MOST


@dataclass(frozen=True)
class Objective:
    """
    alpha            the balance loss' factor (Eq. 3), 0.1 in the paper; 0: none
    scale_weights    one weight per scale, coarse to fine (Eq. 10, "imbalance"); they are made to sum to the number of scales
    gamma            the text-guided sampler's share, drawn per sample from this range. The paper draws it at random and does
                     not say from where: this range is a guess
    layers           its layer, drawn per sample from this range of depths, both ends included; the paper's 8 … 24 of 32
    sampler_dropout  each of the two samplers is off for a sample with this probability, so that one set of weights
                     answers with and without them; not in the paper
    independent      the turns of a conversation do not see one another
    """

    alpha: float = 0.1
    scale_weights: tuple[float, ...] | None = None
    gamma: tuple[float, float] = (0.75, 0.95)
    layers: tuple[float, float] = (0.25, 0.75)
    sampler_dropout: float = 0.0
    independent: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= MOST:
            raise InputError(f"alpha: expected a number of at least 0 and at most {MOST:g}, got {self.alpha}")
        if self.scale_weights is not None and not (min(self.scale_weights) >= 0 < sum(self.scale_weights) < math.inf):
            raise InputError(
                f"scale_weights: expected numbers of at least 0, not all 0, got {shown(self.scale_weights)}"
            )
        for name, (low, high), least in (("gamma", self.gamma, 1e-9), ("layers", self.layers, 0.0)):
            if not least <= low <= high <= 1:
                raise InputError(f"{name}: expected a range between 0 and 1, got {low} to {high}")
        if not 0 <= self.sampler_dropout <= 1:
            raise InputError(f"sampler_dropout: expected a probability, got {self.sampler_dropout}")


def draw_guidance(
    objective: Objective, depth: int, seed: int, position: int, size: int, model: LlavaNetwork
) -> Guidance:
    """Draw how the examples at `position` … `position + size - 1` of a run are sampled. The seed alone decides."""
    low, high = (round(share * depth) for share in objective.layers)
    pooled, layers, gammas = [], [], []
    for place in range(position, position + size):
        rng = np.random.default_rng([seed, 2, place])
        keep_map, keep_all = rng.random(2) < objective.sampler_dropout
        layer = int(rng.integers(min(low, depth - 1), min(high, depth - 1) + 1))
        pooled.append(model.before_llm is not None and not keep_map)
        layers.append(None if model.inside_llm is None or keep_all else layer)
        gammas.append(float(rng.uniform(*objective.gamma)))
    return Guidance(pooled, layers, gammas)


def seed_draws(seed: int, position: int) -> None:
    """Let what a network draws for the examples at a position, such as dropout, follow from the seed and it alone."""
    torch.manual_seed(int(np.random.SeedSequence([seed, 3, position]).generate_state(1, np.uint64)[0]))


def with_gradient(loss: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """`loss`, with a gradient of 0 where it reaches nothing that is trained, as of text alone behind a frozen decoder."""
    if loss.requires_grad:
        return loss
    trained = (p for p in model.parameters() if p.requires_grad)
    return loss + sum(0.0 * p.float().sum() for p in islice(trained, 1))


class AnswerObjective(nn.Module):
    """A model with its loss; its parameters are the model's. Raises InputError for a sampler that cannot be trained with."""

    def __init__(self, model: LlavaNetwork, objective: Objective, seed: int):
        super().__init__()
        if not (model.inside_llm is None or isinstance(model.inside_llm, TextGuidedSampler)):
            # It would follow one token of one turn, but a conversation has many turns.
            name = type(model.inside_llm).__name__
            raise InputError(f"sampler: {name} acts inside the language model and is not for training")
        self.model, self.objective, self.seed = model, objective, seed
        check_sampler(model.before_llm, Balance(objective.alpha, objective.scale_weights))

    def forward(self, batch: Batch, num_targets: int, num_batches: int) -> tuple[torch.Tensor, dict[str, float]]:
        """The part of a step's loss that this micro-batch adds, and figures to report.

        num_targets, num_batches: the answers' tokens and the micro-batches of the whole step, over all processes. The
        cross-entropy is a mean over the step's tokens, the balance loss a mean over its micro-batches.
        """
        depth = self.model.config.text.num_hidden_layers
        size = len(batch.pictures)
        guidance = draw_guidance(self.objective, depth, self.seed, batch.position, size, self.model)
        seed_draws(self.seed, batch.position)
        output = forward(self.model, batch, guidance, self.objective.independent)
        answers = F.cross_entropy(output.logits.float(), output.targets, reduction="sum")
        loss = answers / num_targets
        figures = {
            "loss": float(answers.detach()) * num_batches / num_targets,  # their mean is the step's, whatever the split
            "tokens": float(output.share.mean()),
            "tokens_entered": float(output.entered.mean()),
        }
        of_sampler, more = sampler_loss(
            self.model.before_llm, output.pictures, Balance(self.objective.alpha, self.objective.scale_weights)
        )
        loss, figures = loss + of_sampler / num_batches, figures | more
        return with_gradient(loss, self.model), figures
