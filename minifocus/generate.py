"""From prompts to answers: read the prompts once, then choose one token after another, in a batch or as a stream."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from .errors import InputError
from .generation_options import GenerationOptions, Options
from .inference_copy import at_inference
from .inputs.processor import Images, ModelInput, Processor, pad_left
from .llama import LayerCache
from .model import LlavaNetwork
from .trace import Answer, count_layer_tokens, count_tokens, trace_pictures


class Generation:
    """Answers a batch: prompts[i] about images[i] (a path, a PIL image, several of them, or None)."""

    def __init__(
        self,
        network: LlavaNetwork,
        processor: Processor,
        images: Sequence[Images],
        prompts: Sequence[str],
        given: GenerationOptions,
    ):
        options = Options.of(given)
        self.tokenizer, stop_ids = processor.text_tokenizer, processor.stop_token_ids()
        for name, value in (("images", images), ("prompts", prompts)):
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise InputError(f"{name}: expected a list with one for each answer, got {type(value).__name__}")
        if not prompts or len(images) != len(prompts):
            raise InputError(f"images and prompts: expected as many of each, got {len(images)} and {len(prompts)}")
        self.network, self.options = at_inference(network), options
        started = time.perf_counter()
        self.inputs = [processor(*one, options.template) for one in zip(images, prompts, strict=True)]
        self.rows = [Row(options, one, processor, stop_ids) for one in self.inputs]
        self.prefill_seconds, self.decode_seconds = time.perf_counter() - started, 0.0

    def tokens(self) -> Iterator[list[int | None]]:
        """Each row's next token, None for rows that have ended, until all have."""
        logits = self.prefill()
        while True:
            chosen = [row.choose(own) for row, own in zip(self.rows, logits, strict=True)]
            yield chosen
            if all(row.finish for row in self.rows):
                return
            logits = self.decode(chosen)

    @torch.inference_mode()
    def prefill(self) -> torch.Tensor:
        """Read the prompts; return the logits [B, V] of each answer's first token, float32, on the CPU."""
        started = time.perf_counter()
        network, inputs = self.network, self.inputs
        self.inputs = []  # the pixels need not stay for as long as the answer is made
        ids, mask, instruction = (column.to(network.device) for column in pad_left(inputs))
        tiles, sizes = [t for one in inputs for t in one.tiles], [s for one in inputs for s in one.sizes]
        pictures = network.encode_pictures(tiles, sizes, network.before_llm)
        rows, visual = network.embed(ids, pictures, mask, instruction, network.before_llm)
        del pictures
        room = min(128, max(row.longest for row in self.rows))
        self.caches = [LayerCache(room) for _ in range(network.config.text.num_hidden_layers)]
        self.read = network.prefill(rows, visual, self.caches, last=1)
        self.positions = self.read.rows.positions[:, -1]
        for row, last in zip(self.rows, self.positions.tolist(), strict=True):
            row.longest = min(row.longest, network.config.text.max_position_embeddings - last)
        logits = network.language_model.lm_head(self.read.rows.hidden[:, -1]).float().cpu()
        self.prefill_seconds += time.perf_counter() - started
        return logits

    @torch.inference_mode()
    def decode(self, chosen: list[int | None]) -> torch.Tensor:
        """Append a token to every row; return the logits [B, V] of the next."""
        started = time.perf_counter()
        # A row that has ended is fed any token: nobody reads what it gives.
        tokens = torch.tensor([0 if token is None else token for token in chosen], device=self.network.device)
        self.positions = self.positions + 1
        hidden = self.network.language_model.model.decode(tokens, self.positions, self.caches)
        logits = self.network.language_model.lm_head(hidden).float().cpu()
        self.decode_seconds += time.perf_counter() - started
        return logits

    def answers(self) -> list[Answer]:
        """The answers as far as they are made: whole ones once `tokens` has ended."""
        traces = trace_pictures(self.read)
        return [
            Answer(
                text=self.tokenizer.decode(row.token_ids).strip(),
                token_ids=row.token_ids,
                tokens=count_tokens(self.read, number),
                layer_tokens=count_layer_tokens(self.read, number),
                finish=row.finish or "length",
                prefill_seconds=self.prefill_seconds,
                decode_seconds=self.decode_seconds,
                pictures=traces[number],
            )
            for number, row in enumerate(self.rows)
        ]


class Row:
    """One answer while it is made. `finish` is None until it has ended."""

    def __init__(self, options: Options, prompt: ModelInput, processor: Processor, stop_ids: set[int]):
        self.options, self.stop_ids = options, stop_ids
        self.prompt_ids, self.token_ids = prompt.input_ids.tolist(), list[int]()
        folder, length = processor.config.generation, len(self.prompt_ids)
        self.constraints, self.longest = options.constraints(folder, length), options.longest(folder, length)
        self.finish: Literal["stop", "length"] | None = None
        self.generator = torch.Generator()
        if options.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(options.seed)

    def choose(self, logits: torch.Tensor) -> int | None:
        """Choose the next token by logits [V]. A stop token ends the answer and gives None."""
        if self.finish:
            return None
        logits = self.constraints.apply(logits, self.prompt_ids, self.token_ids, self.stop_ids)
        if self.options.temperature == 0:
            token = int(logits.argmax())
        else:
            # Relative to the largest, and in double precision: no temperature, however small, gives NaN.
            scaled = (logits - logits.max()).double() / self.options.temperature
            token = sample(scaled, self.options.top_p, self.generator)
        if token in self.stop_ids:
            self.finish = "stop"
            return None
        self.token_ids.append(token)
        if len(self.token_ids) == self.longest:
            self.finish = "length"
        return token


def sample(logits: torch.Tensor, top_p: float, generator: torch.Generator) -> int:
    """Draw from softmax(logits [V]), restricted to the smallest set of likeliest tokens with probability `top_p`."""
    probability, order = logits.softmax(dim=-1).sort(descending=True, stable=True)
    before = probability.cumsum(0) - probability
    probability = probability.where(before < top_p, 0)
    return int(order[torch.multinomial(probability, 1, generator=generator)])
