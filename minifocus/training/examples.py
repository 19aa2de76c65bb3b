"""Conversations as token ids with labels, and the order in which a run sees them."""

from __future__ import annotations

import copy
import logging
import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from .. import cards
from ..arguments import settle
from ..conversations import Conversation
from ..errors import CheckpointError, InputError
from ..image import open_image
from ..prompt import ANSWERS, IMAGE, TURN_BEGINS, build_prompt, end_token_id

if TYPE_CHECKING:
    from ..model import Llava

NO_LABEL = -100
# So many unusable conversations in a row are no accident of the data.
MOST_SKIPPED = 100

_log = logging.getLogger("minifocus")


class UnusableConversation(InputError):
    """One conversation cannot be trained on; others can."""


@dataclass(frozen=True)
class Example:
    """A conversation of S tokens, with one placeholder for each uncompressed visual token.

    input_ids    [S] int64
    turn         [S] int64, the turn that a token belongs to; -1 for what all turns share
    instruction  [S] bool, the user's own words
    labels       [S] int64, the token itself where it is part of an answer (its end included), else NO_LABEL
    tiles, sizes of its pictures: [T_i, 3, side, side] and (h, w) each
    """

    input_ids: torch.Tensor
    turn: torch.Tensor
    instruction: torch.Tensor
    labels: torch.Tensor
    tiles: list[torch.Tensor]
    sizes: list[tuple[int, int]]


@dataclass(frozen=True)
class Batch:
    """B examples, padded on the left to S tokens: see `Example`; attention_mask [B, S] is False for padding."""

    input_ids: torch.Tensor
    turn: torch.Tensor
    instruction: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor
    tiles: list[torch.Tensor]
    sizes: list[tuple[int, int]]
    pictures: list[int]  # of each example
    position: int  # of the first example in the run's order, from which random choices are drawn

    @property
    def num_targets(self) -> int:
        return int((self.labels != NO_LABEL).sum())

    @property
    def num_turns(self) -> int:
        return int(self.turn.max()) + 1


def collate(examples: Sequence[Example], position: int = 0) -> Batch:
    """Pad on the left, as `Llava.embed` does, so that every row ends in its last column."""

    def stack(name: str, padding: int | bool) -> torch.Tensor:
        columns = [getattr(example, name) for example in examples]
        longest = max(len(column) for column in columns)
        return torch.stack([torch.nn.functional.pad(c, (longest - len(c), 0), value=padding) for c in columns])

    lengths = torch.tensor([len(example.input_ids) for example in examples])
    longest = int(lengths.max())
    return Batch(
        input_ids=stack("input_ids", 0),
        turn=stack("turn", -1),
        instruction=stack("instruction", False),
        labels=stack("labels", NO_LABEL),
        attention_mask=torch.arange(longest) >= longest - lengths[:, None],
        tiles=[tiles for example in examples for tiles in example.tiles],
        sizes=[size for example in examples for size in example.sizes],
        pictures=[len(example.tiles) for example in examples],
        position=position,
    )


def encode(
    model: Llava, conversation: Conversation, independent: bool = False, max_tokens: int | None = None
) -> Example:
    """A conversation in the model's template.

    independent  every turn is asked about the pictures as if it were alone, and sees no other; the pictures' places in
                 the text then are in front. Otherwise turns follow one another and see the ones before.
    max_tokens   of the sequence; by default the context length. Turns that no longer fit are left out, from the end; the
                 first is cut off there, as LLaVA's are.

    Raises UnusableConversation where nothing of its first answer fits, or a picture cannot be read or has no place of its
    own; InputError where the model has no tokenizer for this, and CheckpointError where that does not know the placeholder.
    """
    tokenizer, processor, config = model.tokenizer, model.image_processor, model.config
    if tokenizer is None or processor is None:
        raise InputError(f"model: training needs a folder with a tokenizer; {model.folder} has none")
    end = end_token_id(model.template, tokenizer)
    if end is None:
        raise InputError(f"model: the tokenizer of {model.folder} has no token that ends a turn of {model.template!r}")
    try:
        processed = [processor(open_image(image)) for image in conversation.images]
    except InputError as error:
        raise UnusableConversation(f"conversation {conversation.id!r}: {error}") from error
    counts = [model.num_visual_tokens(size) for _, size in processed]
    limit = min(max_tokens or config.text.max_position_embeddings, config.text.max_position_embeddings)

    columns: dict[str, list[Any]] = {"input_ids": [], "turn": [], "instruction": [], "labels": []}
    remaining, used = list(counts), 0
    for number, turn in enumerate(conversation.turns):
        question, places = turn.question, turn.question.count(IMAGE)
        if independent:
            question, places = re.sub(rf"{IMAGE}\s*", "", question).strip(), len(counts)
            remaining = list(counts)
        prompt = build_prompt(question, places, model.template)
        text = prompt.text
        if number and not independent and model.template in TURN_BEGINS:
            text = text[text.index(TURN_BEGINS[model.template]) :]
        shift = len(prompt.text) - len(text)
        begin, last = prompt.instruction[0] - shift, prompt.instruction[1] - shift
        answer = ANSWERS.get(model.template, "{answer}").format(answer=turn.answer.strip())
        encoded = tokenizer.encode(text + answer)
        if counts and encoded.ids.count(config.image_token_id) != places:
            raise CheckpointError(
                f"{model.folder}: the tokenizer's {IMAGE} is not config.json's image token {config.image_token_id}"
            )
        rows: list[tuple[int, bool, int]] = []  # id, instruction, label
        shared = 0
        for token, (first, after) in zip(encoded.ids, encoded.offsets, strict=True):
            if not len(rows) and number and token == tokenizer.bos_token_id and not independent:
                continue
            if token == config.image_token_id and counts:
                if not remaining:
                    raise UnusableConversation(
                        f"conversation {conversation.id!r}: has more {IMAGE} places than pictures"
                    )
                rows += [(token, False, NO_LABEL)] * remaining.pop(0)
            else:
                own = first < last and after > begin and first < after
                rows.append((token, own, token if after > len(text) else NO_LABEL))
            if independent and ((token == config.image_token_id and not remaining) or (after == 0 and not counts)):
                shared = len(rows)
        rows.append((end, False, end))
        if independent and number:
            rows, shared = rows[shared:], 0
        if len(columns["input_ids"]) + len(rows) > limit:
            if number:
                break
            cut = rows[:limit]
            if all(label == NO_LABEL for *_, label in cut):
                raise UnusableConversation(
                    f"conversation {conversation.id!r}: its first turn takes {len(rows)} tokens; expected its answer to "
                    f"begin within {limit}"
                )
            rows = cut
        ids, instruction, labels = zip(*rows, strict=True)
        columns["input_ids"] += ids
        columns["instruction"] += instruction
        columns["labels"] += labels
        columns["turn"] += [-1] * shared + [number] * (len(rows) - shared)
        used = len(counts) - len(remaining)
    largest = max(columns["input_ids"])
    if largest >= config.text.vocab_size:
        raise InputError(f"model: {model.folder}: token {largest} of its tokenizer is beyond vocab_size")
    return Example(
        **{name: torch.tensor(values) for name, values in columns.items()},
        tiles=[pixels for pixels, _ in processed[:used]],
        sizes=[size for _, size in processed[:used]],
    )


class Source(Protocol):
    """Numbered conversations."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Conversation: ...


@dataclass(frozen=True)
class CardScenes:
    """The miniature's scenes, drawn when asked for: `count` of a split from its scene `first` on, or as many as it has.

    Raises InputError for a scene that is not of the split.
    """

    count: int = cards.SPLIT_SIZE // 2
    first: int = 0
    split: str = "train"
    dense: bool | None = None

    def __post_init__(self) -> None:
        cards.scenes(self.split, self.first)  # refuses what is none
        settle(self, count=min(self.count, cards.SPLIT_SIZE - self.first))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Conversation:
        drawn = cards.scenes(self.split, self.first + index, self.dense)
        return cards.conversation(next(scene for scene in drawn if scene.questions))


class Batches(torch.utils.data.Dataset[Batch]):
    """The micro-batches of a run in order: number i holds the examples at positions i·size … (i + 1)·size - 1.

    A position's example follows from the seed alone: every pass over the source (an epoch) is a new permutation of it, or
    the source's own order where that is `shuffle` False (drawn scenes are random already). At most `max_turns` turns are
    taken, in random order where they are independent. An UnusableConversation is an error or, with `skip_unusable`, a
    warning, and the next conversation in that order takes its place.
    """

    def __init__(
        self,
        model: Llava,
        source: Source,
        size: int,
        seed: int,
        independent: bool = False,
        max_turns: int | None = None,
        max_tokens: int | None = None,
        shuffle: bool = True,
        skip_unusable: bool = False,
    ):
        if not len(source):
            raise InputError("data: expected at least one conversation, got none")
        self.model, self.source, self.size, self.seed = model, source, size, seed
        self.independent, self.max_turns, self.max_tokens, self.shuffle = independent, max_turns, max_tokens, shuffle
        self.skip_unusable = skip_unusable
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __getstate__(self) -> dict[str, Any]:
        """What a process that reads ahead is sent where it does not inherit memory: the model but for its parts."""
        bare = copy.copy(self.model)
        bare._modules, bare._parameters = {}, {}
        return {**self.__dict__, "model": bare}

    def conversation(self, position: int, skipped: int = 0) -> Conversation:
        """At a position, or `skipped` conversations after it in its epoch's order, which begins anew at its end."""
        epoch, index = divmod(position, len(self.source))
        index = (index + skipped) % len(self.source)
        if self.shuffle:
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.source))
            index = int(self._order[index])
        found = self.source[index]
        turns = found.turns
        if self.independent:
            order = np.random.default_rng([self.seed, 1, position]).permutation(len(turns))
            turns = tuple(turns[i] for i in order)
        return Conversation(found.id, found.images, turns[: self.max_turns])

    def __getitem__(self, number: int) -> Batch:
        first = number * self.size
        return collate([self.example(first + i) for i in range(self.size)], first)

    def example(self, position: int) -> Example:
        for skipped in range(min(len(self.source), MOST_SKIPPED)):
            conversation = self.conversation(position, skipped)
            try:
                return encode(self.model, conversation, self.independent, self.max_tokens)
            except UnusableConversation as error:
                if not self.skip_unusable:
                    raise UnusableConversation(f"{error} (skip_unusable leaves such a conversation out)") from error
                _log.warning("left out: %s", error)
        raise InputError(f"data: expected a usable conversation, got {skipped + 1} that are not, one after another")

    def share(self, numbers: Iterable[int], workers: int = 0) -> Iterator[Batch]:
        """These micro-batches one after another, made ahead by `workers` processes where there are some.

        `numbers` are taken as they are needed: there may be any number of them.
        """
        loader = torch.utils.data.DataLoader(
            _OrError(self), batch_size=None, sampler=numbers, num_workers=workers, worker_init_fn=_leave_to_the_first
        )
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            yield batch


def _leave_to_the_first(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal: the one that these read for ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _OrError(torch.utils.data.Dataset[Any]):
    """Errors as values: raised in a worker process, they would come with its traceback in their text."""

    def __init__(self, batches: Batches):
        self.batches = batches

    def __getitem__(self, number: int) -> Batch | CheckpointError | InputError:
        try:
            return self.batches[number]
        except (CheckpointError, InputError) as error:
            return error
