"""An answer, and what the samplers did to its pictures: how many tokens each layer read (§4.4), which, with what score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .inputs.token_layout import Layout
from .model import Prefill
from .rows import Rows
from .samplers.hooks import VisualTokens


@dataclass(frozen=True)
class TokenCounts:
    """Visual tokens of one prompt, newlines and thumbnails included.

    full          before any sampler: what plain LLaVA-NeXT reads, with a token for every patch
    after_vision  as they enter the language model
    after_text    as they reach its last layer
    equivalent    the mean over layers as a fraction of `full`: (m - n + i·n/L) / full (paper §4.4) when n of m tokens go
                  before layer i of L
    """

    full: int
    after_vision: int
    after_text: int
    equivalent: float


@dataclass(frozen=True)
class PictureTrace:
    """What the samplers did to one picture; `layout` says what place in the uncompressed sequence is where.

    choice      [Rh, Rw] int64, the scale chosen per region, or None
    entered     [n] int64, the places of the tokens that entered the language model
    extent      [n, 2] int64, the map cells that each of them covers, down and across
    kept        [k] int64, of those that reached its last layer
    importance  [n] float32, the inside-LLM sampler's score of each that entered, NaN where none was given
    """

    layout: Layout
    choice: torch.Tensor | None
    entered: torch.Tensor
    extent: torch.Tensor
    kept: torch.Tensor
    importance: torch.Tensor


@dataclass(frozen=True)
class Answer:
    """
    text          without special tokens, and without white space at either end
    token_ids     as they were chosen, without the token that ended the answer
    tokens        visual tokens of the prompt, see `TokenCounts`
    finish        "stop" when the model ended its answer, "length" at max_new_tokens or the context's end
    layer_tokens  how many tokens, text and all, each decoder layer read of the prompt
    prefill_seconds, decode_seconds
                  to open and read the prompts, and to answer them: of a batch, those of the whole batch in each answer
    pictures      what became of each of the prompt's pictures
    """

    text: str
    token_ids: list[int]
    tokens: TokenCounts
    layer_tokens: list[int]
    finish: Literal["stop", "length"]
    prefill_seconds: float
    decode_seconds: float
    pictures: list[PictureTrace]


def count_tokens(prefill: Prefill, row: int) -> TokenCounts:
    """The accounting of §4.4 for one row."""
    full = sum(visual.layout.num_plain for visual in prefill.pictures[row])
    per_layer = prefill.visual[:, row].float()
    entered = sum(len(visual.source) for visual in prefill.pictures[row])
    equivalent = float(per_layer.mean()) / full if full else 1.0
    return TokenCounts(full, entered, int(per_layer[-1]), equivalent)


def count_layer_tokens(prefill: Prefill, row: int) -> list[int]:
    """Text and visual tokens of one row that each decoder layer read."""
    visual = prefill.visual[:, row]
    text = int(prefill.rows.valid[row].sum()) - int(visual[-1])
    return [text + count for count in visual.tolist()]


def trace_pictures(prefill: Prefill) -> list[list[PictureTrace]]:
    """Per row and picture: which tokens entered, which were kept, and their scores, as places in the uncompressed sequence."""
    return [
        [_trace(prefill, row, number, visual) for number, visual in enumerate(own)]
        for row, own in enumerate(prefill.pictures)
    ]


def _trace(prefill: Prefill, row: int, number: int, visual: VisualTokens) -> PictureTrace:
    entered = visual.source.cpu()

    def places(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """The picture's tokens among a batch's: their mask in the row, and their places in the picture's sequence."""
        mine = (rows.picture[row] == number) & rows.valid[row]
        return mine, (rows.source[row][mine] - visual.begin).cpu()

    scores = torch.full((visual.layout.num_tokens,), float("nan"), dtype=torch.float32)
    for _, before, selection in prefill.selections:
        mine, where = places(before)
        given = selection.scores[row][mine].cpu().float()
        scores[where] = given.where(~given.isnan(), scores[where])
    _, kept = places(prefill.rows)
    choice = visual.choice.cpu() if visual.choice is not None else None
    return PictureTrace(visual.layout, choice, entered, visual.extent.cpu(), kept, scores[entered])
