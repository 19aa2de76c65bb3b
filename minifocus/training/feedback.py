"""What a frozen language model says of the granularities: each turn's loss at each of them (AVG-LLaVA §3.2, stage 4).

It is computed once for an example, and written down, so that a router is trained on it for as long as one likes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..arguments import brief, shown, whole
from ..errors import InputError
from ..files.reading import named, regular
from ..model import LlavaNetwork
from ..samplers.hooks import PictureFeatures
from .examples import Batch
from .granularities import granular
from .packed import Guidance, forward


class Feedback:
    """
    losses of turns by example: [turns, granularities] float32, NaN for a turn without an answer to predict
    shares of tokens by example: [granularities] float32, of what plain LLaVA reads

    They are kept in `folder`, in one file for each process that wrote some. `identity` says what they are of, and `choices` how
    many granularities there are. Raises InputError for a folder that has others, or that cannot be used.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], choices: int):
        self.folder, self.identity, self.choices = folder, json.loads(json.dumps(identity)), choices
        self.known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._file: Path | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files = sorted(folder.glob("*.jsonl"))
        except OSError as error:
            raise InputError(f"{named(folder)}: expected a folder for feedback: {error.strerror}") from error
        for file in files:
            self._read(file)

    def _read(self, file: Path) -> None:
        """Take what a file has. What is behind its last line's end was cut off when its process was killed."""
        try:
            content = regular(file, InputError).read_bytes()
        except OSError as error:
            raise InputError(f"{named(file)}: cannot be read: {error.strerror}") from error
        *lines, torn = content.split(b"\n")
        if not lines and self._header().startswith(torn):
            return
        try:
            header = json.loads(lines[0] if lines else torn)
            if not isinstance(header, dict):
                raise TypeError(f"a header is an object, not {shown(header)}")
            records = [self._record(json.loads(line)) for line in lines[1:]]
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
            reason = brief(f"{type(error).__name__}: {error}")
            raise InputError(f"{file}: expected a file of feedback: {reason}") from error
        if header != self.identity:
            wrong = sorted(name for name in {*self.identity, *header} if header.get(name) != self.identity.get(name))
            raise InputError(
                f"{file}: expected the feedback of this model to these examples, got another's "
                f"({shown(wrong)} differ): name another folder or delete it"
            )
        self.known.update(records)

    def _record(self, found: dict[str, Any]) -> tuple[int, tuple[torch.Tensor, torch.Tensor]]:
        losses, shares = (torch.tensor(found[name], dtype=torch.float32) for name in ("losses", "shares"))
        if losses.ndim != 2 or losses.shape[1] != self.choices or shares.shape != (self.choices,):
            shapes = f"{tuple(losses.shape)} and {tuple(shares.shape)}"
            raise ValueError(f"losses and shares are of {self.choices} granularities, not of {shapes}")
        if bool(losses.isinf().any()) or not bool(shares.isfinite().all()):
            raise ValueError("losses and shares are finite")
        return whole("example", found["example"], 0), (losses, shares)

    def _header(self) -> bytes:
        return json.dumps(self.identity).encode() + b"\n"

    def add(self, found: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Write down the losses and shares of examples, by number. Raises InputError where that cannot be done."""
        self.known.update(found)
        records = [
            {"example": example, "losses": losses.tolist(), "shares": shares.tolist()}
            for example, (losses, shares) in found.items()
        ]
        content = b"".join(json.dumps(record).encode() + b"\n" for record in records)
        if self._file is None:
            self._file = self.folder / f"{time.time_ns()}-{os.getpid()}.jsonl"
            content = self._header() + content
        try:
            with self._file.open("ab") as file:
                file.write(content)
        except OSError as error:
            raise InputError(f"{named(self._file)}: cannot be written: {error.strerror}") from error

    def of(
        self, model: LlavaNetwork, batch: Batch, features: Sequence[PictureFeatures], independent: bool
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The losses and the shares of each example of a batch: those that are known, or those that are now computed."""
        numbers = range(batch.first, batch.first + len(batch.pictures))
        if not all(number in self.known for number in numbers):
            losses, shares = ask(model, batch, features, independent)
            self.add({number: (losses[i], shares[i]) for i, number in enumerate(numbers)})
        return [self.known[number] for number in numbers]


@torch.no_grad()
def ask(
    model: LlavaNetwork, batch: Batch, features: Sequence[PictureFeatures], independent: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss of the tokens of each turn's answer at each granularity [examples, turns, granularities], NaN for a turn
    that has none, and the tokens that enter at each as a share of plain LLaVA's [examples, granularities]."""
    sampler, size, turns = granular(model), len(batch.pictures), max(1, batch.num_turns)
    guidance = Guidance([True] * size, [None] * size, [1.0] * size)
    losses, shares, before = [], [], sampler.forced
    try:
        for number in range(len(sampler.granularities)):
            sampler.forced = number
            output = forward(model, batch, guidance, independent, features)
            of_tokens = F.cross_entropy(output.logits.float(), output.targets, reduction="none").cpu()
            place = (output.example * turns + output.turn.clamp(min=0)).cpu()
            summed = torch.zeros(size * turns).index_add(0, place, of_tokens)
            losses.append((summed / place.bincount(minlength=size * turns)).view(size, turns))  # 0 / 0 is NaN
            shares.append(output.entered)
    finally:
        sampler.forced = before
    return torch.stack(losses, dim=-1), torch.stack(shares, dim=-1).float()
