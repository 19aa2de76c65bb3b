"""Send a batch of whole conversations through the model. Every turn is guided by its own question.

At inference a prompt has one question, and what the text-guided sampler leaves out is removed. In training a picture has
several questions behind it, sampled at several layers, and shapes must not change: tokens are hidden by a mask instead. For
a conversation of one turn the two are equal; where turns share a picture, its tokens look at whatever some turn has kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from ..llama import DecoderLayer
from ..model import LlavaNetwork
from ..ops import select_top_p
from ..rows import Rows, causal_mask
from ..samplers.hooks import BeforeLLM, Context, InsideLLM, PictureFeatures, VisualTokens, Words, uncompressed
from ..samplers.text_guided import TextGuidedSampler
from .examples import NO_LABEL, Batch


@dataclass(frozen=True)
class PackedRows(Rows):
    """Rows of several turns.

    turn         [B, S] int64, the turn that a token belongs to, -1 for what all turns share
    seen         [B, T, S] bool, the tokens that each of T turns may look at
    independent  whether a turn sees only what is shared and itself, or the turns before it as well
    """

    turn: torch.Tensor
    seen: torch.Tensor
    independent: bool

    def attention_mask(self) -> torch.Tensor:
        """Text attends to what its turn sees. Pictures, and what turns share, attend to whatever some turn sees."""
        turns = self.seen.shape[1]
        views = torch.cat([self.seen, self.seen.any(dim=1, keepdim=True)], dim=1)
        view = self.turn.where((self.turn >= 0) & (self.picture < 0), turns)
        visible = views.gather(1, view[:, :, None].expand(-1, -1, views.shape[2])) & self.valid[:, None, :]
        if self.independent:
            visible = visible & ((self.turn[:, None, :] < 0) | (self.turn[:, None, :] == self.turn[:, :, None]))
        return causal_mask(visible)[:, None]


@dataclass(frozen=True)
class Guidance:
    """How each example of a batch is sampled: whether its pictures are pooled, and the text-guided sampler's layer and gamma.

    layer[i] is None where example i keeps all tokens.
    """

    pooled: Sequence[bool]
    layer: Sequence[int | None]
    gamma: Sequence[float]

    @staticmethod
    def none(size: int) -> Guidance:
        return Guidance([False] * size, [None] * size, [1.0] * size)


@dataclass(frozen=True)
class Output:
    """
    logits    [targets, V], for each token of an answer
    targets   [targets] int64
    example, turn  [targets] int64, whose answer each is part of
    pictures  per example, per picture: its tokens as they entered the decoder, the selector's logits among them
    share     [B] float, the visual tokens that a turn sees, on average over the example's turns and all layers, as a share
              of what plain LLaVA reads; 1 where there is no picture
    entered   [B] float, those that enter the decoder, likewise
    """

    logits: torch.Tensor
    targets: torch.Tensor
    example: torch.Tensor
    turn: torch.Tensor
    pictures: list[list[VisualTokens]]
    share: torch.Tensor
    entered: torch.Tensor


def forward(
    model: LlavaNetwork,
    batch: Batch,
    guidance: Guidance,
    independent: bool = False,
    features: Sequence[PictureFeatures] | None = None,
) -> Output:
    """The batch through `model`, whose samplers do what `guidance` says.

    features  what `encode_pictures` gave of the batch's pictures, to be used again; None: they are encoded
    """
    device = model.device
    if features is None:
        features = model.encode_pictures(batch.tiles, batch.sizes, model.before_llm)
    pooled = [guidance.pooled[example] for example, n in enumerate(batch.pictures) for _ in range(n)]
    before = None if model.before_llm is None else _SomePictures(model.before_llm, pooled)
    mask = batch.attention_mask.to(device)
    rows, pictures = model.embed(
        batch.input_ids.to(device), features, mask, batch.instruction.to(device), before_llm=before
    )
    packed = _pack(rows, batch.turn.to(device), batch.num_turns, independent)
    labels = batch.labels.to(device)
    following = _at(labels, packed, 1)  # the next token, where it is part of an answer
    items = _items(packed, _at(labels, packed, 0) != NO_LABEL, model.inside_llm)
    full = torch.tensor([sum(v.layout.num_plain for v in own) for own in pictures])
    entered = (packed.picture >= 0).sum(dim=1).cpu()
    turns = torch.arange(packed.seen.shape[1], device=device)
    own = (turns <= packed.turn.amax(dim=1, keepdim=True)) | (turns == 0)  # [B, T], the turns that an example has
    seen = []
    context = Context(pictures)

    def before_layer(index: int, layer: DecoderLayer, rows: Rows) -> Rows:
        nonlocal context
        assert isinstance(rows, PackedRows)
        acting = [example for example, at in enumerate(guidance.layer) if at == index]
        if isinstance(model.inside_llm, TextGuidedSampler):
            if acting:
                rows = _guide(model.inside_llm, layer, rows, items, acting, guidance.gamma)
        elif model.inside_llm is not None:
            selection = model.inside_llm(index, layer, rows, context)
            if selection is not None:
                rows = replace(rows, valid=rows.valid & selection.kept)
            context = replace(context, previous=(layer, rows))
        visual = (rows.picture >= 0) & rows.valid
        seen.append(((rows.seen & visual[:, None]).sum(dim=2) * own).sum(dim=1) / own.sum(dim=1))
        return rows

    is_target = following != NO_LABEL
    read = int(is_target.any(dim=0).flip(0).nonzero().max()) + 1 if bool(is_target.any()) else 1
    rows = model.language_model.model.prefill(packed, None, before_layer, last=read)
    logits = model.language_model.lm_head(rows.hidden[is_target[:, -read:]])
    share = torch.stack(seen).mean(dim=0).cpu()
    share, entered = ((count / full).where(full > 0, 1.0) for count in (share, entered))
    example, _ = is_target.nonzero(as_tuple=True)
    return Output(logits, following[is_target], example, packed.turn[is_target], pictures, share, entered)


class _SomePictures(BeforeLLM):
    """A sampler that pools some pictures, in their order, and leaves the others as they are."""

    def __init__(self, sampler: BeforeLLM, pooled: Sequence[bool]):
        super().__init__()
        self._sampler = [sampler]  # in a list: no module of this one
        self._pooled = iter(pooled)

    def forward(self, picture: PictureFeatures, text: Words) -> VisualTokens:
        return self._sampler[0](picture, text) if next(self._pooled) else uncompressed(picture)


def _pack(rows: Rows, turn: torch.Tensor, turns: int, independent: bool) -> PackedRows:
    """Add turns to the rows that `LlavaNetwork.embed` makes. Independent turns all start at one position."""
    turn = turn.gather(1, rows.source.clamp(min=0)).where(rows.valid, -1)
    positions = rows.positions
    if independent:
        place = torch.arange(turn.shape[1], device=turn.device).expand_as(turn)
        own = turn[:, None, :] == torch.arange(turns, device=turn.device)[:, None]  # [B, T, S]
        start = place[:, None].where(own, turn.shape[1]).amin(dim=2)  # [B, T], the column where each turn begins
        begin = start.gather(1, turn.clamp(min=0))
        shift = begin - start[:, :1]
        positions = (positions - shift).where(turn >= 0, positions)
    seen = rows.valid[:, None].expand(-1, max(turns, 1), -1)
    columns = {f.name: getattr(rows, f.name) for f in fields(Rows)}
    return PackedRows(**{**columns, "positions": positions}, turn=turn, seen=seen, independent=independent)


def _at(labels: torch.Tensor, rows: Rows, ahead: int) -> torch.Tensor:
    """The labels of the tokens that come `ahead` columns of `input_ids` after those of `rows`."""
    padded = torch.nn.functional.pad(labels, (0, 1), value=NO_LABEL)
    return padded.gather(1, (rows.source + ahead).where(rows.valid, labels.shape[1]))


@dataclass(frozen=True)
class _Item:
    """One turn's question about one picture: columns of its words and of the picture's tokens."""

    turn: int
    words: np.ndarray
    tokens: np.ndarray


def _items(rows: PackedRows, answers: torch.Tensor, sampler: InsideLLM | None) -> list[list[_Item]]:
    """Per example, the questions that the text-guided sampler decides on. `answers` marks tokens that do not guide it."""
    if not isinstance(sampler, TextGuidedSampler):
        return []
    names = (rows.turn, rows.picture, rows.instruction, rows.newline, rows.valid, answers)
    turn, picture, instruction, newline, valid, answer = (value.cpu().numpy() for value in names)
    prompt = valid & (picture < 0) & ~answer
    items = []
    for row in range(len(turn)):
        own: list[_Item] = []
        for number in range(int(picture[row].max()) + 1):
            tokens = np.flatnonzero(valid[row] & ~newline[row] & (picture[row] == number))
            for t in range(rows.seen.shape[1]) if len(tokens) else ():
                of_turn = np.flatnonzero(prompt[row] & (turn[row] == t))
                if not len(of_turn) or of_turn[-1] < tokens[-1]:
                    continue
                words = of_turn[instruction[row, of_turn] & (of_turn > tokens[-1])]
                if sampler.options.text == "all":
                    words = np.flatnonzero(prompt[row] & ((turn[row] == t) | (turn[row] < 0)))
                elif sampler.options.text == "last" or not len(words):
                    words = of_turn[-1:]
                own.append(_Item(t, words, tokens))
        items.append(own)
    return items


@torch.no_grad()
def _guide(
    sampler: TextGuidedSampler,
    layer: DecoderLayer,
    rows: PackedRows,
    items: list[list[_Item]],
    acting: Sequence[int],
    gamma: Sequence[float],
) -> PackedRows:
    """Hide from every turn of the acting examples the tokens that its question does not need (Eq. 6 to 9)."""
    width, device = rows.valid.shape[1], rows.valid.device
    jobs = [(row, item) for row in acting for item in items[row]]
    if not jobs:
        return rows
    words = torch.from_numpy(np.concatenate([row * width + item.words for row, item in jobs])).to(device)
    tokens = torch.from_numpy(np.concatenate([row * width + item.tokens for row, item in jobs])).to(device)
    cu_words = np.cumsum([0] + [len(item.words) for _, item in jobs])
    cu_tokens = np.cumsum([0] + [len(item.tokens) for _, item in jobs])
    ends = (torch.from_numpy(cu).to(device) for cu in (cu_words, cu_tokens))
    scores = sampler.score(layer, rows, words, tokens, *ends)

    seen = rows.seen.clone()
    flat = seen.view(-1)
    turns = np.concatenate([np.full(len(item.tokens), item.turn) for _, item in jobs])
    row_of = np.concatenate([np.full(len(item.tokens), row) for row, item in jobs])
    places = torch.from_numpy((row_of * seen.shape[1] + turns) * width).to(device) + tokens % width
    flat[places] = False
    done = 0
    for row in acting:  # one gamma each
        count = len(items[row])
        if not count:
            continue
        first, last = int(cu_tokens[done]), int(cu_tokens[done + count])
        offsets = torch.from_numpy(cu_tokens[done : done + count + 1] - first).to(device)
        kept, _ = select_top_p(scores[first:last], offsets, float(gamma[row]), sampler.options.keep)
        flat[places[first:last][kept]] = True
        done += count
    return replace(rows, seen=seen)
