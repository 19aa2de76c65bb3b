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

from ..arguments import shown
from ..errors import InputError
from ..model import LlavaNetwork
from ..samplers.hooks import PictureFeatures
from .examples import Batch
from .granularities import granular
from .packed import Guidance, forward


class Feedback:
    """
    losses of turns by example: [turns, granularities] float32, NaN for a turn without an answer to predict
    shares of tokens by example: [granularities] float32, of what plain LLaVA reads

    They are kept in `folder`, in one file for each process that wrote some. `identity` says what they are of. Raises
    InputError for a folder that has others.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.folder, self.identity = folder, json.loads(json.dumps(identity))
        self.known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._file: Path | None = None
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.glob("*.jsonl")):
            self._read(file)

    def _read(self, file: Path) -> None:
        header, *lines = file.read_text(encoding="utf-8").split("\n")
        try:
            theirs = json.loads(header)
            if theirs != self.identity:
                wrong = [name for name in self.identity if theirs.get(name) != self.identity[name]]
                raise InputError(
                    f"{file}: expected the feedback of this model to these examples, got another's "
                    f"({shown(wrong)} differ): name another folder or delete it"
                )
            for line in lines[:-1]:  # what is behind the last line's end was cut off when its process was killed
                found = json.loads(line)
                losses = torch.tensor(found["losses"], dtype=torch.float32)
                self.known[int(found["example"])] = (losses, torch.tensor(found["shares"], dtype=torch.float32))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file}: expected a file of feedback: {type(error).__name__}: {error}") from error

    def add(self, found: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.known.update(found)
        if self._file is None:
            self._file = self.folder / f"{time.time_ns()}-{os.getpid()}.jsonl"
            self._file.write_text(json.dumps(self.identity) + "\n", encoding="utf-8")
        with self._file.open("a", encoding="utf-8") as file:
            for example, (losses, shares) in found.items():
                record = {"example": example, "losses": losses.tolist(), "shares": shares.tolist()}
                file.write(json.dumps(record) + "\n")

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
