"""From pictures and questions to answers: prompt assembly, prefill, decoding one token at a time, token accounting."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike
from typing import TYPE_CHECKING, Literal, cast

import torch
from PIL import Image
from torch import nn

from . import arguments
from .constraints import Constraints
from .errors import CheckpointError, InputError
from .inputs.open_image import open_image
from .inputs.prompt import build_prompt, check_name, encode_prompt
from .inputs.tokenizer import StreamDecoder, Tokenizer
from .llama import LayerCache
from .loading.generation_config import GenerationConfig
from .rows import Rows
from .samplers.hooks import Layout, VisualTokens

if TYPE_CHECKING:
    from .model import Llava, Prefill

Picture = str | PathLike[str] | Image.Image
Images = Picture | Sequence[Picture] | None


@dataclass(frozen=True)
class TokenCounts:
    """Visual tokens of one prompt, newlines and thumbnails included.

    full          before any sampler: what plain LLaVA-NeXT reads
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


@dataclass(frozen=True)
class Options:
    """
    max_new_tokens  at most this many tokens per answer; None: what generation_config.json says, or else 256
    temperature     0: always the likeliest token; above: sample from softmax(logits / temperature). What the folder's
                    generation_config.json says of sampling does not count
    top_p           sample only from the likeliest tokens that together have this probability
    seed            of the sampling; each row draws from its own generator, so that a batch gives what single calls give
    template        a name in `minifocus.inputs.prompt.TEMPLATES`; None: the model's own
    repetition_penalty, no_repeat_ngram_size, bad_words_ids, suppress_tokens, begin_suppress_tokens, min_new_tokens
                    see `minifocus.constraints.Constraints`; None: what generation_config.json says
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    template: str | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    min_new_tokens: int | None = None

    def __post_init__(self) -> None:
        checked: dict[str, object] = {
            "temperature": arguments.number("temperature", self.temperature, 0),
            "top_p": arguments.share("top_p", self.top_p),
        }
        if self.max_new_tokens is not None:
            checked["max_new_tokens"] = arguments.whole("max_new_tokens", self.max_new_tokens, 1)
        if self.seed is not None:
            checked["seed"] = arguments.whole("seed", self.seed, -(2**63))
        if self.template is not None:
            check_name(self.template)
        arguments.settle(self, **checked)

    def constraints(self, of_folder: GenerationConfig, prompt_length: int) -> Constraints:
        """Those that were given, and the folder's for a prompt of so many tokens."""
        given = {field.name: getattr(self, field.name) for field in fields(Constraints)}
        given = {name: value for name, value in given.items() if value is not None}
        least = max(of_folder.min_length - prompt_length, of_folder.constraints.min_new_tokens)
        return replace(of_folder.constraints, **{"min_new_tokens": least, **given})

    def longest(self, of_folder: GenerationConfig, prompt_length: int) -> int:
        """How many tokens an answer to a prompt of so many may have. Raises InputError where the folder leaves none."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if of_folder.max_new_tokens is not None or of_folder.max_length is None:
            return of_folder.max_new_tokens or 256
        if of_folder.max_length <= prompt_length:
            raise InputError(
                f"prompt: expected fewer tokens than the folder's max_length of {of_folder.max_length}, got {prompt_length} "
                "with those of its pictures: give max_new_tokens instead"
            )
        return of_folder.max_length - prompt_length


def answer_batch(model: Llava, images: Sequence[Images], prompts: Sequence[str], **options: object) -> list[Answer]:
    """Answer prompts[i] about images[i] (a path, a PIL image, several of them, or None). Keywords: see `Options`."""
    run = _Run(model, images, prompts, options)
    for _ in run.steps():
        pass
    return run.answers()


class Stream(Iterator[str]):
    """Iterates, once, over one answer's text as it is made; `.answer` holds the whole when the iteration is over.

    The pieces joined, without white space at either end, are the answer's text.
    """

    def __init__(self, model: Llava, image: Images, prompt: str, **options: object):
        self._pieces = self._generate(_Run(model, [image], [prompt], options))
        self.answer: Answer | None = None

    def __next__(self) -> str:
        return next(self._pieces)

    def _generate(self, run: _Run) -> Iterator[str]:
        """A generator's variables, the run with its caches among them, go when it ends."""
        decoder = StreamDecoder(run.tokenizer)
        for (token,) in run.steps():
            if token is not None and (piece := decoder.push(token)):
                yield piece
        if piece := decoder.flush():
            yield piece
        self.answer = run.answers()[0]


class _Run:
    """One batch on its way from pictures and prompts to answers."""

    def __init__(self, model: Llava, images: Sequence[Images], prompts: Sequence[str], options: dict[str, object]):
        try:
            self.options = Options(**options)  # type: ignore[arg-type]
        except TypeError:
            known = ", ".join(Options.__dataclass_fields__)
            unknown = ", ".join(sorted(set(options) - set(Options.__dataclass_fields__)))[:100]
            raise InputError(f"{unknown}: not an option of generation; its options: {known}") from None
        if model.tokenizer is None:
            raise CheckpointError(f"{model.folder}: has no tokenizer.json or tokenizer.model, which text needs")
        for name, value in (("images", images), ("prompts", prompts)):
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise InputError(f"{name}: expected a list with one for each answer, got {type(value).__name__}")
        if not prompts or len(images) != len(prompts):
            raise InputError(f"images and prompts: expected as many of each, got {len(images)} and {len(prompts)}")
        self.model, self.tokenizer = _as_at_inference(model), model.tokenizer
        self.template = self.options.template or model.prompt_template()
        self.stop_ids = stop_token_ids(model, self.tokenizer)
        self.token_ids: list[list[int]] = [[] for _ in prompts]
        self.finish: list[Literal["stop", "length"] | None] = [None] * len(prompts)
        self.generators = [torch.Generator() for _ in prompts]
        for generator in self.generators:
            if self.options.seed is None:
                generator.seed()
            else:
                generator.manual_seed(self.options.seed)
        self.decode_seconds = 0.0
        started = time.perf_counter()
        self._inputs = [self._prepare(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        self.prompts = [one.ids.tolist() for one in self._inputs]
        folder, lengths = model.config.generation, [len(one.ids) for one in self._inputs]
        self.constraints = [self.options.constraints(folder, length) for length in lengths]
        self.longest = [self.options.longest(folder, length) for length in lengths]
        self.prefill_seconds = time.perf_counter() - started

    def _prepare(self, image: Images, prompt: str) -> _Input:
        """Open the pictures, fill the template, and put one placeholder per visual token into the token ids."""
        if not isinstance(prompt, str):
            raise InputError(f"prompt: expected text, got {type(prompt).__name__}")
        sources = _as_list(image)
        built = build_prompt(prompt, len(sources), self.template)
        processor, config = self.model.image_processor, self.model.config
        assert processor is not None  # `load` sets it
        tiles, sizes = [], []
        for source in sources:
            pixels, size = processor(open_image(source))
            tiles.append(pixels)
            sizes.append(size)
        encoding = encode_prompt(self.tokenizer, built.text)
        limit = config.text.max_position_embeddings
        if not encoding.ids:
            raise InputError(f"prompt: {arguments.shown(prompt)} has no tokens")
        if len(encoding.ids) > limit:
            raise InputError(f"prompt: takes {len(encoding.ids)} tokens, more than the context length of {limit}")
        if max(encoding.ids) >= config.text.vocab_size:
            raise CheckpointError(
                f"{self.model.folder}: the tokenizer gives token {max(encoding.ids)}, but config.json's vocab_size is "
                f"{config.text.vocab_size}"
            )
        if sources and encoding.ids.count(config.image_token_id) != len(sources):
            raise CheckpointError(
                f"{self.model.folder}: the tokenizer's <image> is not config.json's image token {config.image_token_id}"
            )
        counts = iter([self.model.num_visual_tokens(size) for size in sizes])
        begin, end = built.instruction
        ids: list[int] = []
        instruction: list[bool] = []
        for token, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
            is_image = bool(sources) and token == config.image_token_id
            repeats = next(counts) if is_image else 1
            ids += [token] * repeats
            instruction += [not is_image and first < end and last > begin and first < last] * repeats
        return _Input(torch.tensor(ids), torch.tensor(instruction), tiles, sizes)

    def steps(self) -> Iterator[list[int | None]]:
        """Each row's next token, None for rows that have ended, until all have."""
        logits = self._prefill()
        while True:
            chosen = [self._choose(row, logits[row]) for row in range(len(self.finish))]
            yield chosen
            if all(self.finish):
                return
            logits = self._decode(chosen)

    @torch.inference_mode()
    def _prefill(self) -> torch.Tensor:
        started = time.perf_counter()
        model, inputs = self.model, self._inputs
        self._inputs = []  # the pixels need not stay for as long as the answer is made
        longest = max(len(i.ids) for i in inputs)
        ids = torch.zeros(len(inputs), longest, dtype=torch.int64)
        mask, instruction = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
        for row, one in enumerate(inputs):
            begin = longest - len(one.ids)
            ids[row, begin:], mask[row, begin:], instruction[row, begin:] = one.ids, True, one.instruction
        device = model.device
        tiles, sizes = [t for i in inputs for t in i.tiles], [s for i in inputs for s in i.sizes]
        mask, instruction = mask.to(device), instruction.to(device)
        pictures = model.encode_pictures(tiles, sizes, model.before_llm)
        rows, visual = model.embed(ids.to(device), pictures, mask, instruction, model.before_llm)
        del pictures
        self.caches = [LayerCache() for _ in range(model.config.text.num_hidden_layers)]
        self.prefill: Prefill = model.prefill(rows, visual, self.caches, last=1)
        self.positions = self.prefill.rows.positions[:, -1]
        logits = model.language_model.lm_head(self.prefill.rows.hidden[:, -1]).float().cpu()
        self.prefill_seconds += time.perf_counter() - started
        return logits

    @torch.inference_mode()
    def _decode(self, chosen: list[int | None]) -> torch.Tensor:
        started = time.perf_counter()
        # A row that has ended is fed any token: nobody reads what it gives.
        tokens = torch.tensor([0 if token is None else token for token in chosen], device=self.model.device)
        self.positions = self.positions + 1
        hidden = self.model.language_model.model.decode(tokens, self.positions, self.caches)
        logits = self.model.language_model.lm_head(hidden).float().cpu()
        self.decode_seconds += time.perf_counter() - started
        return logits

    def _choose(self, row: int, logits: torch.Tensor) -> int | None:
        """The row's next token; None, and the row is over, at a stop token."""
        if self.finish[row]:
            return None
        logits = self.constraints[row].apply(logits, self.prompts[row], self.token_ids[row], self.stop_ids)
        if self.options.temperature == 0:
            token = int(logits.argmax())
        else:
            # Relative to the largest, and in double precision: no temperature, however small, gives NaN.
            scaled = (logits - logits.max()).double() / self.options.temperature
            token = sample(scaled, self.options.top_p, self.generators[row])
        if token in self.stop_ids:
            self.finish[row] = "stop"
            return None
        self.token_ids[row].append(token)
        context_end = int(self.positions[row]) + 1 >= self.model.config.text.max_position_embeddings
        if len(self.token_ids[row]) == self.longest[row] or context_end:
            self.finish[row] = "length"
        return token

    def answers(self) -> list[Answer]:
        traces = trace_pictures(self.prefill)
        return [
            Answer(
                text=self.tokenizer.decode(self.token_ids[row]).strip(),
                token_ids=self.token_ids[row],
                tokens=count_tokens(self.prefill, row),
                layer_tokens=count_layer_tokens(self.prefill, row),
                finish=self.finish[row] or "length",
                prefill_seconds=self.prefill_seconds,
                decode_seconds=self.decode_seconds,
                pictures=traces[row],
            )
            for row in range(len(self.finish))
        ]


def _as_list(image: Images) -> list[Picture]:
    if image is None:
        return []
    if isinstance(image, str | PathLike | Image.Image):
        return [image]
    if isinstance(image, list | tuple):
        return list(image)
    raise InputError(f"image: expected a path, a PIL image or a list of them, got {type(image).__name__}")


def _as_at_inference(model: Llava) -> Llava:
    """The model with its samplers of this moment and in no training, whose Eq. 2 would change what they answer.

    It is a copy that shares parameters, buffers and hooks: nothing is switched in the model itself, which another thread may
    be training, or giving another sampler, meanwhile.
    """
    copies: dict[int, nn.Module] = {}

    def copied(module: nn.Module, deep: bool) -> nn.Module:
        if id(module) not in copies:
            own = copies[id(module)] = copy.copy(module)
            own._modules = dict(module._modules)
            if deep:
                own.training = False
                own._modules = {
                    name: None if child is None else copied(child, deep) for name, child in module._modules.items()
                }
        return copies[id(module)]

    return cast("Llava", copied(model, any(module.training for module in model.modules())))


@dataclass(frozen=True)
class _Input:
    ids: torch.Tensor
    instruction: torch.Tensor
    tiles: list[torch.Tensor]
    sizes: list[tuple[int, int]]


def stop_token_ids(model: Llava, tokenizer: Tokenizer) -> set[int]:
    """The checkpoint's end-of-sequence tokens, and those with which chat templates end a turn."""
    ids: set[int | None] = set(model.config.eos_token_ids) or {tokenizer.eos_token_id}
    ids |= {tokenizer.token_id(token) for token in ("<|eot_id|>", "<|im_end|>")}
    return {token for token in ids if token is not None}


def sample(logits: torch.Tensor, top_p: float, generator: torch.Generator) -> int:
    """Draw from softmax(logits [V]), restricted to the smallest set of likeliest tokens with probability `top_p`."""
    probability, order = logits.softmax(dim=-1).sort(descending=True, stable=True)
    before = probability.cumsum(0) - probability
    probability = probability.where(before < top_p, 0)
    return int(order[torch.multinomial(probability, 1, generator=generator)])


def count_tokens(prefill: Prefill, row: int) -> TokenCounts:
    """The accounting of §4.4 for one row."""
    full = int(prefill.full[row])
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
    """Per row and picture, what entered, what was kept and how it was scored, as places in the uncompressed sequence."""
    return [
        [_trace(prefill, row, number, visual) for number, visual in enumerate(own)]
        for row, own in enumerate(prefill.pictures)
    ]


def _trace(prefill: Prefill, row: int, number: int, visual: VisualTokens) -> PictureTrace:
    first, entered = prefill.first[row][number], visual.source.cpu()

    def places(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """The picture's tokens among a batch's: their mask in the row, and their places in the picture's sequence."""
        mine = (rows.picture[row] == number) & rows.valid[row]
        return mine, (rows.source[row][mine] - first).cpu()

    scores = torch.full((visual.layout.num_tokens,), float("nan"), dtype=torch.float32)
    for _, before, selection in prefill.selections:
        mine, where = places(before)
        given = selection.scores[row][mine].cpu().float()
        scores[where] = given.where(~given.isnan(), scores[where])
    _, kept = places(prefill.rows)
    choice = visual.choice.cpu() if visual.choice is not None else None
    return PictureTrace(visual.layout, choice, entered, visual.extent.cpu(), kept, scores[entered])
