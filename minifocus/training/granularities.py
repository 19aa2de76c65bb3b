"""AVG-LLaVA's stage 3 (its §3.2): a model learns to read all granularities, by the mean of their losses (Eq. 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..avg_llava.sampler import AVGLLaVA
from ..errors import InputError
from ..model import LlavaNetwork
from .examples import Batch
from .objective import with_gradient
from .packed import Guidance, forward


def granular(model: LlavaNetwork) -> AVGLLaVA:
    """The model's sampler. Raises InputError where it is another than AVG-LLaVA's."""
    if not isinstance(model.before_llm, AVGLLaVA):
        raise InputError(f"sampler: expected avg-llava, got {type(model.before_llm).__name__}")
    return model.before_llm


class GranularityObjective(nn.Module):
    """A model with its loss; its parameters are the model's. The tower is run once, the decoder once for each granularity."""

    def __init__(self, model: LlavaNetwork, independent: bool):
        super().__init__()
        granular(model)
        self.model, self.independent = model, independent

    def forward(self, batch: Batch, num_targets: int, num_batches: int) -> tuple[torch.Tensor, dict[str, float]]:
        """The part of a step's loss that this micro-batch adds, and figures to report: see `objective.AnswerObjective`."""
        model, sampler = self.model, granular(self.model)
        size = len(batch.pictures)
        guidance = Guidance([True] * size, [None] * size, [1.0] * size)
        features = model.encode_pictures(batch.tiles, batch.sizes)
        before, figures, total = sampler.forced, {}, torch.zeros((), device=model.device)
        try:
            for number, tokens in enumerate(sampler.granularities):
                sampler.forced = number
                output = forward(model, batch, guidance, self.independent, features)
                loss = F.cross_entropy(output.logits.float(), output.targets, reduction="sum") / num_targets
                figures[f"loss_{tokens}"] = float(loss.detach()) * num_batches
                total = total + loss / len(sampler.granularities)
        finally:
            sampler.forced = before
        return with_gradient(total, model), {"loss": float(total.detach()) * num_batches, **figures}
