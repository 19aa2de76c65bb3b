"""AVG-LLaVA's stage 4 (its §3.2): the router learns to rank granularities as the frozen language model does (RGLF)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..arguments import choice, number, settle
from ..errors import InputError
from ..model import LlavaNetwork
from ..samplers.hooks import PictureFeatures
from .examples import NO_LABEL, Batch
from .feedback import Feedback
from .granularities import granular
from .objective import seed_draws, with_gradient
from .settings import MOST


@dataclass(frozen=True)
class Ranking:
    """
    form            "paper": Eq. 4 to 9, whose text says of the margin that it is the difference of the losses; "released": the
                    public code's, whose margins also grow with the distance of ranks, and whose pairs weigh more the rarer
                    their distance is
    margin          of the released form: factor of its margins
    rank_weight     of the ranking loss
    choice_weight   of the cross-entropy of the best granularity: 0.1 in the paper
    token_price     added to the feedback: the price of all of plain LLaVA's tokens; not in the paper, 0 by default
    """

    form: Literal["paper", "released"] = "paper"
    margin: float = 0.1
    rank_weight: float = 1.0
    choice_weight: float = 0.1
    token_price: float = 0.0

    def __post_init__(self) -> None:
        names = ("margin", "rank_weight", "choice_weight", "token_price")
        settle(
            self,
            form=choice("form", self.form, ("paper", "released")),
            **{name: number(name, getattr(self, name), 0, MOST) for name in names},
        )
        if not self.rank_weight + self.choice_weight:
            raise InputError("rank_weight, choice_weight: expected one above 0, got none")


def ranking_loss(logits: torch.Tensor, losses: torch.Tensor, ranking: Ranking) -> torch.Tensor:
    """RGLF, the mean over questions: the router's logits [Q, G] and the language model's losses [Q, G] of the granularities.

    With the granularities in order of their losses, s the router's log-probabilities and λ_ij the difference of the losses of
    the i-th and the j-th, it is Σ_{i<j} max(0, s_j − s_i + λ_ij), and the cross-entropy of the first.
    """
    order = losses.argsort(dim=1, stable=True)
    scores, ordered = logits.log_softmax(dim=1).gather(1, order), losses.gather(1, order)
    ranks = torch.zeros((), device=logits.device)
    for distance in range(1, logits.shape[1]):
        gap = ordered[:, distance:] - ordered[:, :-distance]
        wrong = scores[:, distance:] - scores[:, :-distance]
        if ranking.form == "paper":
            ranks = ranks + (wrong + gap).clamp(min=0).sum(dim=1).mean()
        else:
            ranks = ranks + (wrong + ranking.margin * distance * gap).clamp(min=0).mean()
    best = F.nll_loss(scores, torch.zeros_like(order[:, 0]))
    return ranking.rank_weight * ranks + ranking.choice_weight * best


class KeptFeatures:
    """The pictures of examples as the frozen tower and projector see them, for a run that takes these examples again.

    limit  bytes that are kept at most, on the model's device; the examples that come first are
    """

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self.kept: dict[int, list[PictureFeatures]] = {}

    def of(self, model: LlavaNetwork, batch: Batch) -> list[PictureFeatures]:
        """The features of a batch's pictures, in order."""
        examples = range(batch.first, batch.first + len(batch.pictures))
        if all(example in self.kept for example in examples):
            return [picture for example in examples for picture in self.kept[example]]
        found = model.encode_pictures(batch.tiles, batch.sizes)
        pictures = iter(found)
        for example, count in zip(examples, batch.pictures, strict=True):
            own = list(islice(pictures, count))
            size = sum(picture.views.nbytes + picture.map.nbytes for picture in own)
            if example not in self.kept and self.size + size <= self.limit:
                self.kept[example], self.size = own, self.size + size
        return found


class RouterObjective(nn.Module):
    """A model whose router learns; its parameters are the model's, of which all others are frozen.

    keep  bytes of features to keep at most, see `KeptFeatures`
    """

    def __init__(
        self, model: LlavaNetwork, ranking: Ranking, feedback: Feedback, seed: int, independent: bool, keep: int = 0
    ):
        super().__init__()
        if granular(model).router is None:
            raise InputError("sampler: expected avg-llava with a router, got one whose granularity is forced")
        self.model, self.ranking, self.feedback = model, ranking, feedback
        self.seed, self.independent, self.features = seed, independent, KeptFeatures(keep)

    def questions(self, batch: Batch) -> list[list[torch.Tensor]]:
        """Of every turn of every example, the embeddings [W, C] of the words that the router may filter.

        Of the whole prompt, no answer is among them, as in the public code's training.
        """
        model, device = self.model, self.model.device
        options = granular(model).options
        whole_prompt = options.text == "prompt"
        ids, turn = batch.input_ids.to(device), batch.turn.to(device)
        text = batch.attention_mask.to(device) & (ids != model.config.image_token_id)
        text = text & (batch.labels.to(device) == NO_LABEL)
        embeddings = model.language_model.model.embed_tokens(ids.where(text, 0))
        instruction = batch.instruction.to(device)

        def words(row: int, number: int) -> torch.Tensor:
            own = turn[row] == number
            before = (turn[row] < 0) if self.independent else (turn[row] < number)
            if options.text == "nothing":
                return embeddings[row][:0]
            mine = text[row] & (own | before if whole_prompt else own & instruction[row])
            return embeddings[row][mine]

        turns = turn.amax(dim=1).clamp(min=0).tolist()
        return [[words(row, number) for number in range(last + 1)] for row, last in enumerate(turns)]

    def turns_of(self, pictures: Sequence[PictureFeatures], batch: Batch, example: int) -> list[int]:
        """The turn in which each of an example's pictures comes, -1 for what all turns share: those before do not see it."""
        turn = batch.turn[example][batch.input_ids[example] == self.model.config.image_token_id].tolist()
        ends = accumulate(picture.layout.num_tokens for picture in pictures)
        return [turn[end - picture.layout.num_tokens] for picture, end in zip(pictures, ends, strict=True)]

    def forward(self, batch: Batch, num_targets: int, num_batches: int) -> tuple[torch.Tensor, dict[str, float]]:
        """The part of a step's loss that this micro-batch adds: a mean over its questions, and the step's over micro-batches."""
        sampler = granular(self.model)
        nothing = torch.zeros((), device=self.model.device)
        if not batch.tiles:  # the language model need not be asked
            return with_gradient(nothing, self.model), {}
        with torch.no_grad():
            features = self.features.of(self.model, batch)
            answered = self.feedback.of(self.model, batch, features, self.independent)
            words = self.questions(batch)
        seed_draws(self.seed, batch.position)
        logits, losses, tokens, number = [], [], [], 0
        for example, (per_turn, shares) in enumerate(answered):
            answers = per_turn[: len(words[example])].isfinite().all(dim=1).nonzero().squeeze(1).tolist()
            own = features[number : number + batch.pictures[example]]
            for picture, first in zip(own, self.turns_of(own, batch, example), strict=True):
                there = [turn for turn in answers if turn >= first]
                if there:
                    found = sampler.route(picture.views, [words[example][turn] for turn in there]).float()
                    logits.append(found)
                    losses.append((per_turn[there] + self.ranking.token_price * shares).to(found.device))
                    tokens.append(shares.to(found.device)[found.argmax(dim=1)])
            number += batch.pictures[example]
        if not logits:
            return with_gradient(nothing, self.model), {}
        scores, wanted = torch.cat(logits), torch.cat(losses)
        loss = ranking_loss(scores, wanted, self.ranking)
        chosen = wanted.gather(1, scores.argmax(dim=1, keepdim=True))
        figures = {
            "loss": float(loss.detach()),
            "tokens_entered": float(torch.cat(tokens).mean()),
            "regret": float((chosen - wanted.amin(dim=1, keepdim=True)).mean()),
            "agrees": float((scores.argmax(dim=1) == wanted.argmin(dim=1)).float().mean()),
        }
        return loss / num_batches, figures
