"""A batch of token rows on their way through the decoder, with what each token is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from .ops import gather_tokens

_PADDING = {"source": -1, "picture": -1}  # where it is not 0


@dataclass(frozen=True)
class Rows:
    """B rows of S tokens, padded on the left, so that the last column is every row's last token.

    hidden       [B, S, C]  embeddings or hidden states
    valid        [B, S]     bool, False for padding (and, in training, for tokens dropped by mask)
    positions    [B, S]     int64, for rotary embedding; a token keeps its position when others are dropped
    source       [B, S]     int64, the column of `input_ids` that the token stands for (a pooled visual token:
                            the placeholder of its window's first cell); -1 for padding
    picture      [B, S]     int64, which picture of its row a visual token belongs to; -1 for text
    newline      [B, S]     bool, the tokens of a picture that no sampler scores: those that end a row of its feature map,
                            and LLaVA-1.5's class token where it is kept (`Layout.unscored`)
    instruction  [B, S]     bool, the tokens of the user's question
    """

    hidden: torch.Tensor
    valid: torch.Tensor
    positions: torch.Tensor
    source: torch.Tensor
    picture: torch.Tensor
    newline: torch.Tensor
    instruction: torch.Tensor

    def keep(self, kept: torch.Tensor) -> Rows:
        """Only the tokens where `kept` [B, S] is True, in their order, padded on the left again."""
        kept = kept & self.valid
        counts = kept.sum(dim=1)
        longest = int(counts.max()) if len(counts) else 0
        if bool((counts == kept.shape[1]).all()):
            return self
        # A stable sort of False before True moves every kept token to the right without changing their order.
        order = kept.to(torch.uint8).argsort(dim=1, stable=True)[:, kept.shape[1] - longest :]
        valid = torch.arange(longest, device=kept.device) >= longest - counts[:, None]
        first = torch.arange(len(kept), device=kept.device)[:, None] * kept.shape[1]
        names = [f.name for f in fields(self) if f.name != "valid"]
        columns = [getattr(self, name).flatten(0, 1) for name in names]
        gathered = gather_tokens(columns, (first + order).where(valid, -1).flatten())
        moved = {name: column.unflatten(0, valid.shape) for name, column in zip(names, gathered, strict=True)}
        for name, value in _PADDING.items():
            moved[name] = moved[name].where(valid, value)
        return Rows(valid=valid, **moved)

    def with_hidden(self, hidden: torch.Tensor) -> Rows:
        return replace(self, hidden=hidden)

    def pictures(self) -> list[tuple[int, torch.Tensor]]:
        """(row, columns of its tokens) of every picture, without the tokens that `newline` marks."""
        scored = (self.picture >= 0) & ~self.newline & self.valid
        found = []
        for row in range(len(self.valid)):
            for picture in self.picture[row].unique().tolist():
                tokens = (scored[row] & (self.picture[row] == picture)).nonzero().squeeze(1)
                if picture >= 0 and len(tokens):
                    found.append((row, tokens))
        return found

    def attention_mask(self) -> torch.Tensor | None:
        """Which token attends to which, bool [B, 1, S, S]; None where plain causal attention is meant."""
        if bool(self.valid.all()):
            return None
        return causal_mask(self.valid[:, None, :])[:, None]


def causal_mask(visible: torch.Tensor) -> torch.Tensor:
    """`visible` [B, S or 1, S], which key each query may see → the same among earlier tokens only, bool [B, S, S]."""
    size = visible.shape[-1]
    causal = torch.ones(size, size, dtype=torch.bool, device=visible.device).tril()
    itself = torch.eye(size, dtype=torch.bool, device=visible.device)  # or softmax over nothing would give NaN
    return (causal & visible) | itself


def one_row(pieces: Sequence[tuple[torch.Tensor, ...]]) -> Rows:
    """Pieces of a sequence, each (hidden [n, C], source, picture, newline, instruction [n]) → Rows with B = 1."""
    hidden, source, picture, newline, instruction = (torch.cat(column)[None] for column in zip(*pieces, strict=True))
    positions = torch.arange(source.shape[1], device=source.device)[None]
    return Rows(hidden, torch.ones_like(newline), positions, source, picture, newline, instruction)


def stack_rows(rows: list[Rows]) -> Rows:
    """Rows of one sequence each ([1, S_i, …]) → one batch, padded on the left."""
    longest = max(row.hidden.shape[1] for row in rows)
    if all(row.hidden.shape[1] == longest for row in rows):
        return Rows(**{f.name: torch.cat([getattr(row, f.name) for row in rows]) for f in fields(Rows)})

    def pad(row: Rows, name: str) -> torch.Tensor:
        value = getattr(row, name)
        missing = longest - value.shape[1]
        return torch.cat([value.new_full((1, missing, *value.shape[2:]), _PADDING.get(name, 0)), value], dim=1)

    return Rows(**{f.name: torch.cat([pad(row, f.name) for row in rows]) for f in fields(Rows)})
