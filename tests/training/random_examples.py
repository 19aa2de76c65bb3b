"""Examples of random words and pictures, for random models without a tokenizer, and what a plain forward pass makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from checkpoints import IMAGE_TOKEN

import minifocus
from minifocus.samplers.vision_guided import LinearSelector
from minifocus.training.examples import NO_LABEL, Batch, Example

END = 2
DEPTH = 4  # of the random models and of the embedded one


def random_selector(num_thumbnail_tokens: int, branches: int, seed: int = 4) -> LinearSelector:
    selector = LinearSelector(num_thumbnail_tokens, branches)
    generator = torch.Generator().manual_seed(seed)
    for value in selector.parameters():
        value.data = torch.randn(value.shape, generator=generator)
    return selector


def random_example(
    model: minifocus.Llava,
    sizes: Sequence[tuple[int, int]],
    seed: int,
    turns: int = 1,
    independent: bool = False,
    in_turns: Sequence[Sequence[tuple[int, int]]] = (),
) -> Example:
    """Random words and pictures of (h, w) in front, or before the question of the turn that `in_turns` names."""
    generator = torch.Generator().manual_seed(seed)
    side = model.config.vision.image_size
    columns: list[tuple[int, int, bool, int]] = []  # id, turn, instruction, label
    tiles: list[torch.Tensor] = []
    every = list(sizes)

    def words(count: int, turn: int, instruction: bool = False) -> None:
        ids = torch.randint(3, IMAGE_TOKEN, (count,), generator=generator).tolist()
        columns.extend((i, turn, instruction, NO_LABEL) for i in ids)

    def picture(size: tuple[int, int], turn: int) -> None:
        columns.extend([(IMAGE_TOKEN, turn, False, NO_LABEL)] * model.num_visual_tokens(size))
        tiles.append(torch.randn(model.num_tiles(size), 3, side, side, generator=generator))

    shared = -1 if independent else 0
    columns.append((1, shared, False, NO_LABEL))
    words(2, shared)
    for number, size in enumerate(sizes):
        if number:
            words(2, shared, not independent)  # where turns are independent, all pictures are in front of the words
        picture(size, shared)
    for turn in range(turns):
        words(1, turn)
        for size in in_turns[turn] if in_turns else ():
            words(1, turn, True)
            picture(size, turn)
            every.append(size)
        words(3, turn, True)
        words(2, turn)
        answer = torch.randint(3, IMAGE_TOKEN, (2 + turn,), generator=generator).tolist()
        columns.extend((i, turn, False, i) for i in [*answer, END])
    ids, turn_of, instruction, labels = (torch.tensor(c) for c in zip(*columns, strict=True))
    if not model.config.anyres:
        every = [(side, side)] * len(every)
    return Example(ids, turn_of, instruction, labels, tiles, every)


def plain_inputs(model: minifocus.Llava, batch: Batch) -> dict[str, torch.Tensor]:
    """The batch as `model(...)` takes it."""
    inputs = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, instruction_mask=batch.instruction)
    if not batch.tiles:
        return inputs
    most = max(len(own) for own in batch.tiles)
    padded = torch.stack([F.pad(own, (0, 0, 0, 0, 0, 0, 0, most - len(own))) for own in batch.tiles])
    if not model.config.anyres:
        return dict(**inputs, pixel_values=padded[:, 0])
    return dict(**inputs, pixel_values=padded, image_sizes=torch.tensor(batch.sizes))


def at_answers(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[B, S, V] → those from which the answers' tokens are predicted [targets, V]."""
    row, column = (batch.labels != NO_LABEL).nonzero(as_tuple=True)
    return logits[row, column - 1]


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Within `tolerance` of the largest number."""
    assert got.shape == expected.shape and bool(expected.isfinite().all())
    return bool((got - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max())))


def turn_alone(example: Example, turn: int) -> Example:
    """An independent turn asked by itself."""
    mine = (example.turn < 0) | (example.turn == turn)
    columns = {name: getattr(example, name)[mine] for name in ("input_ids", "instruction", "labels")}
    return replace(example, **columns, turn=example.turn[mine].clamp(max=0))


SIZES = [[(57, 91)], [(30, 90), (100, 31)], [], [(50, 50), (1, 400)]]  # the last leaves a map without rows
