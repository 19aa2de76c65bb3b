"""Conversations as token ids with labels, and the order in which a run sees them."""

from __future__ import annotations

import logging
import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ..arguments import shown
from ..errors import CheckpointError, InputError
from ..inputs.conversations import Conversation, Turn
from ..inputs.model_inputs import num_visual_tokens
from ..inputs.open_image import open_image
from ..inputs.processor import Processor, guides
from ..inputs.prompt import build_conversation, encode_prompt
from ..inputs.template_writer import IMAGE

NO_LABEL = -100
# So many unusable conversations in a row are a fault of the whole data.
MOST_SKIPPED = 100

_log = logging.getLogger("minifocus")


class UnusableConversation(InputError):
    """This conversation cannot be used to train on. Others may be."""


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
    first: int  # the same, of a run that takes some examples again and again: which of them is the first

    @property
    def num_targets(self) -> int:
        return int((self.labels != NO_LABEL).sum())

    @property
    def num_turns(self) -> int:
        return int(self.turn.max()) + 1


def collate(examples: Sequence[Example], position: int = 0, first: int | None = None) -> Batch:
    """Pad on the left, as `LlavaNetwork.embed` does, so that every row ends in its last column."""

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
        first=position if first is None else first,
    )


def encode(
    processor: Processor, conversation: Conversation, independent: bool = False, max_tokens: int | None = None
) -> Example:
    """A conversation in the processor's template.

    independent  every turn is asked about the pictures as if it were alone, and sees no other; the pictures' places in
                 the text then are in front. Otherwise turns follow one another and see the ones before.
    max_tokens   of the sequence; by default the context length. Turns that no longer fit are left out, from the end; the
                 first is cut off there, as LLaVA's are.

    Raises UnusableConversation where nothing of its first answer fits, or a picture cannot be read or has no place of its
    own; InputError where the model has no tokenizer for this, and CheckpointError where that does not know the placeholder.
    """
    tokenizer, config = processor.tokenizer, processor.config
    if tokenizer is None:
        raise InputError(f"model: training needs a folder with a tokenizer; {processor.folder} has none")
    try:
        processed = [processor.image_processor(open_image(image)) for image in conversation.images]
    except InputError as error:
        raise UnusableConversation(f"conversation {shown(conversation.id)}: {error}") from error
    counts = [num_visual_tokens(config, size) for _, size in processed]
    limit = min(max_tokens or config.text.max_position_embeddings, config.text.max_position_embeddings)

    def write(turns: Sequence[Turn]) -> list[list[_Token]]:
        asked = [(turn.question, turn.question.count(IMAGE), turn.answer.strip()) for turn in turns]
        if independent:
            asked = [(re.sub(rf"{IMAGE}\s*", "", q).strip(), len(counts), answer) for q, _, answer in asked]
        if sum(places for _, places, _ in asked) > len(counts):
            raise UnusableConversation(f"conversation {shown(conversation.id)}: has more {IMAGE} places than pictures")
        return _tokens(processor, asked, counts)

    turns = conversation.turns
    if independent:
        written = [write([turn])[0] for turn in turns]
        is_shared = [token.id == (config.image_token_id if counts else tokenizer.bos_token_id) for token in written[0]]
        shared = len(is_shared) - is_shared[::-1].index(True) if any(is_shared) else 0
        front = [token.id for token in written[0][:shared]]
        if any([token.id for token in tokens[:shared]] != front for tokens in written):
            raise InputError("template: expected one with the pictures in front, as the turns are to be independent")
        written[1:] = [tokens[shared:] for tokens in written[1:]]
    else:
        written, shared = write(turns), 0
        fitting = sum(end <= limit for end in accumulate(map(len, written)))
        if fitting < len(turns):  # a template may end its last turn in another way
            written = write(turns[: max(1, fitting)])
    columns: list[_Token] = []
    numbers: list[int] = []
    for number, tokens in enumerate(written):
        if len(columns) + len(tokens) > limit:
            if number:
                break
            if all(token.label == NO_LABEL for token in tokens[:limit]):
                raise UnusableConversation(
                    f"conversation {shown(conversation.id)}: its first turn takes {len(tokens)} tokens; expected its answer to "
                    f"begin within {limit}"
                )
        columns += tokens[: limit - len(columns)]
        numbers += [number] * (len(columns) - len(numbers))
    largest = max(token.id for token in columns)
    if largest >= config.text.vocab_size:
        raise InputError(f"model: {processor.folder}: token {largest} of its tokenizer is beyond vocab_size")
    used = len(counts) if independent else sum(turn.question.count(IMAGE) for turn in turns[: numbers[-1] + 1])
    return Example(
        input_ids=torch.tensor([token.id for token in columns]),
        turn=torch.tensor([-1] * shared + numbers[shared:]),
        instruction=torch.tensor([token.instruction for token in columns]),
        labels=torch.tensor([token.label for token in columns]),
        tiles=[pixels for pixels, _ in processed[:used]],
        sizes=[size for _, size in processed[:used]],
    )


class _Token(NamedTuple):
    """One token of a conversation, with what `Example` says of it."""

    id: int
    instruction: bool
    label: int


def _tokens(processor: Processor, turns: Sequence[tuple[str, int, str]], counts: Sequence[int]) -> list[list[_Token]]:
    """The tokens of each turn (question, its number of pictures, answer). `counts` has the placeholders of each picture."""
    tokenizer, config = processor.text_tokenizer, processor.config
    known = {token_id: tokenizer.token(token_id) for token_id in processor.stop_token_ids()}
    end = None if tokenizer.eos_token_id is None else tokenizer.token(tokenizer.eos_token_id)
    text, spans = build_conversation(
        turns, processor.prompt_template(), [token for token in known.values() if token], end
    )
    encoded = encode_prompt(tokenizer, text)
    if counts:
        processor.check_places(encoded, sum(places for _, places, _ in turns))
    repeats = iter(counts)
    written: list[list[_Token]] = [[] for _ in turns]
    number = 0
    for token, offsets in zip(encoded.ids, encoded.offsets, strict=True):
        first, after = offsets
        while number + 1 < len(spans) and first >= spans[number].ended:
            number += 1
        turn = spans[number]
        if token == config.image_token_id and counts:
            written[number] += [_Token(token, False, NO_LABEL)] * next(repeats)
            continue
        answers = after > turn.asked and first < turn.ended
        written[number].append(_Token(token, guides(turn.instruction, offsets), token if answers else NO_LABEL))
    return written


class Source(Protocol):
    """Numbered conversations."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Conversation: ...


class Batches(torch.utils.data.Dataset[Batch]):
    """The micro-batches of a run in order: number i holds the examples at positions i·size … (i + 1)·size - 1.

    A position's example follows from the seed alone: every pass over the source (an epoch) is a new permutation of it, or
    the source's own order where that is `shuffle` False (drawn scenes are random already). At most `max_turns` turns are
    taken, in random order where they are independent. `examples` are how many of these a run has: it then takes the first
    ones again. An UnusableConversation is an error or, with `skip_unusable`, a
    warning, and the next conversation in that order takes its place.
    """

    def __init__(
        self,
        processor: Processor,
        source: Source,
        size: int,
        seed: int,
        independent: bool = False,
        max_turns: int | None = None,
        max_tokens: int | None = None,
        shuffle: bool = True,
        skip_unusable: bool = False,
        examples: int | None = None,
    ):
        if not len(source):
            raise InputError("data: expected at least one conversation, got none")
        self.processor, self.source, self.size, self.seed = processor, source, size, seed
        self.independent, self.max_turns, self.max_tokens, self.shuffle = independent, max_turns, max_tokens, shuffle
        self.skip_unusable = skip_unusable
        if examples is not None and examples % size:
            raise InputError(f"examples: expected a multiple of micro_batch, {size}, got {examples}")
        self.examples = examples
        processor.prompt_template()  # it warns once here, and not in every process that reads ahead
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def conversation(self, position: int, skipped: int = 0) -> Conversation:
        """The conversation at a position, or `skipped` after it. At the end of an epoch's order, it begins again."""
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
        position = number * self.size
        first = position if self.examples is None else position % self.examples
        return collate([self.example(first + i) for i in range(self.size)], position, first)

    def example(self, position: int) -> Example:
        for skipped in range(min(len(self.source), MOST_SKIPPED)):
            conversation = self.conversation(position, skipped)
            try:
                return encode(self.processor, conversation, self.independent, self.max_tokens)
            except UnusableConversation as error:
                if not self.skip_unusable:
                    raise UnusableConversation(f"{error} (skip_unusable leaves such a conversation out)") from error
                _log.warning("left out: %s", error)
        raise InputError(f"data: expected a usable conversation, got {skipped + 1} that are not, one after another")

    def share(self, numbers: Iterable[int], workers: int = 0) -> Iterator[Batch]:
        """These micro-batches one after another, made ahead by `workers` processes where there are some.

        `numbers` are taken one by one as they are needed, so there may be any number of them.
        """
        loader = torch.utils.data.DataLoader(
            _OrError(self), batch_size=None, sampler=numbers, num_workers=workers, worker_init_fn=_leave_to_the_first
        )
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            yield batch


def _leave_to_the_first(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal. Workers ignore it, for the process that they read for ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _OrError(torch.utils.data.Dataset[Any]):
    """Batches, or errors as values: raised in a worker, an error would carry the worker's traceback in its text."""

    def __init__(self, batches: Batches):
        self.batches = batches

    def __getitem__(self, number: int) -> Batch | CheckpointError | InputError:
        try:
            return self.batches[number]
        except (CheckpointError, InputError) as error:
            return error
