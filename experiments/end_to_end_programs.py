"""The programs that `end_to_end.py` compares, each of which runs in a process of its own, and their common model.

Nothing here imports torch at the top, so that the parent stays small and every side pays for its imports itself.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import resource
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .clocks import Reading, Spent, read

THEIRS = "transformers"
SAMPLERS = ("none", "vision", "text", "focus", "focus_reference", "half")


@dataclasses.dataclass(frozen=True)
class Size:
    """The model's sizes, as transformers' configuration classes take them, and how many text tokens a prompt has.

    The picture is two by two tiles large and has a thumbnail: five tiles.
    """

    vision: dict[str, Any]
    text: dict[str, Any]
    words: int
    image_token: int = 3

    @staticmethod
    def of(folder: Path) -> Size:
        """Those of a LLaVA-NeXT folder, of which the weights alone have the rest."""
        from minifocus.errors import CheckpointError
        from minifocus.loading.config import load_config

        config = load_config(folder)
        vision = {name: getattr(config.vision, name) for name in ("image_size", "patch_size")}
        if (2 * vision["image_size"],) * 2 not in config.grid_pinpoints:
            raise CheckpointError(f"{folder}: expected a LLaVA-NeXT that takes a picture of two by two tiles")
        text = {name: getattr(config.text, name) for name in ("vocab_size", "num_hidden_layers")}
        return Size(vision, text, FULL.words, config.image_token_id)

    @property
    def picture(self) -> tuple[int, int]:
        return 2 * self.vision["image_size"], 2 * self.vision["image_size"]

    @property
    def scored_tokens(self) -> int:
        """Visual tokens other than newlines."""
        return 5 * (self.vision["image_size"] // self.vision["patch_size"]) ** 2

    @property
    def visual_tokens(self) -> int:
        return self.scored_tokens + self.picture[0] // self.vision["patch_size"]


FULL = Size(
    vision=dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    ),
    text=dict(
        vocab_size=32064, hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=4096, rms_norm_eps=1e-5,
    ),
    words=32,
)  # fmt: skip
QUICK = Size(
    vision=dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
    ),
    text=dict(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5,
    ),
    words=16,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every process has to know."""

    size: Size
    folder: Path
    dtype: str
    device: str
    new_tokens: int
    seed: int

    def recipe(self) -> dict[str, Any]:
        """What determines the checkpoint's contents."""
        return {"size": dataclasses.asdict(self.size), "dtype": self.dtype, "seed": self.seed}


def make_checkpoint(settings: Settings) -> None:
    """Write the random model: weights for which activations are of order 1 and logits of order 4.

    The decoder's queries are larger than the rest, so that attention picks few tokens and what comes next depends on
    which: with even attention over 3000 tokens the model would repeat one token, whatever its cache holds.
    """
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    tile = settings.size.vision["image_size"]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**settings.size.vision),
        text_config=LlamaConfig(**settings.size.text),
        image_token_index=settings.size.image_token,
        image_grid_pinpoints=[[tile * h, tile * w] for h, w in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))],  # the default
    )
    model = LlavaNextForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(settings.seed)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if "norm" in name or "layrnorm" in name:
            noise = (1.0 if name.endswith("weight") else 0.0) + 0.2 * noise
        elif value.dim() == 1 or "embed" in name or "newline" in name:
            noise *= 0.5
        else:
            gain = 4.0 if "lm_head" in name else 3.0 if "language_model" in name and "q_proj" in name else 1.0
            noise *= gain / value[0].numel() ** 0.5
        value.data = noise
    model.to(getattr(torch, settings.dtype)).save_pretrained(settings.folder)
    (settings.folder / "recipe.json").write_text(json.dumps(settings.recipe()), encoding="utf-8")


class Side(ABC):
    """One of the compared programs. Its methods are called by name from the parent."""

    def __init__(self, settings: Settings):
        import torch

        self.settings, self.torch, self.dtype = settings, torch, getattr(torch, settings.dtype)
        size, generator = settings.size, torch.Generator().manual_seed(settings.seed + 1)
        words = torch.randint(4, size.text["vocab_size"], (size.words,), generator=generator)
        words[words == size.image_token] = 4
        images = torch.full((size.visual_tokens,), size.image_token)
        self.ids = torch.cat([words[: size.words // 2], images, words[size.words // 2 :]])[None].to(settings.device)
        pixels = torch.randn(1, 5, 3, *[size.vision["image_size"]] * 2, generator=generator)
        self.pixels = pixels.to(settings.device, self.dtype)

    def load(self, **options: Any) -> Spent:
        """Load the folder. → what the call took"""
        begun = self.now()
        self.model = self._load(**options)
        return self.since(begun)

    def run(self) -> dict[str, Any]:
        """One prefill, then `new_tokens` greedy steps. → what they took, tokens, visual tokens per layer"""
        # Of a large model nearly all is products of large matrices.
        large = self.settings.device == "cpu" and self.settings.size != QUICK
        threads = self.threads() if large else 1
        with self.torch.inference_mode():
            begun = self.now()
            logits, step, decoder_begun, visual = self._prefill()
            token = logits.argmax(dim=-1)
            spent = {"prefill": self.since(begun, threads), "decoder_prefill": self.since(decoder_begun, threads)}
            tokens, begun = [token], self.now()
            for _ in range(self.settings.new_tokens):
                token = step(token).argmax(dim=-1)
                tokens.append(token)
            spent["decode"] = self.since(begun, calls=self.settings.new_tokens)  # whose products are small
        return {"spent": spent, "tokens": self.torch.cat(tokens).tolist(), "visual": visual}

    def now(self) -> Reading:
        self._wait_for_gpu()
        return read()

    def since(self, begun: Reading, threads: int = 1, calls: int = 1) -> Spent:
        self._wait_for_gpu()
        return Spent.since(begun, threads, calls)

    def _wait_for_gpu(self) -> None:
        if self.settings.device != "cpu":
            self.torch.cuda.synchronize()

    def memory(self) -> dict[str, int]:
        """Bytes: the largest resident set so far, and how today's divides into the process's own and mapped pages."""
        status, used = Path("/proc/self/status"), {}
        if status.exists():
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
            names = {"peak": "VmHWM", "own": "RssAnon", "mapped_files": "RssFile"}
            used = {name: int(lines[field].split()[0]) * 1024 for name, field in names.items()}
        else:  # only here: on Linux, a process begins with its parent's ru_maxrss
            used["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if self.settings.device != "cpu":
            used |= {"peak_resident": used["peak"], "peak": self.torch.cuda.max_memory_allocated()}
        return used

    def threads(self) -> int:
        return self.torch.get_num_threads()

    @abstractmethod
    def _load(self, **options: Any) -> Any:
        """→ the model, on the device."""

    @abstractmethod
    def _prefill(self) -> tuple[Any, Callable[[Any], Any], Reading, list[int]]:
        """→ logits [1, V]; the function from a token [1] to the next logits; when the decoder began; visual tokens per
        layer."""


class Transformers(Side):
    def __init__(self, settings: Settings):
        super().__init__(settings)
        from transformers import LlavaNextForConditionalGeneration

        self.model_class: Any = LlavaNextForConditionalGeneration
        self.decoder_begun: Reading | None = None

    def _load(self) -> Any:
        model = self.model_class.from_pretrained(self.settings.folder, dtype=self.dtype, attn_implementation="sdpa")
        model = model.to(self.settings.device)

        def note(*_: Any) -> None:
            if self.decoder_begun is None:  # a step of one token need not read the clocks
                self.decoder_begun = self.now()

        model.model.language_model.layers[0].register_forward_pre_hook(note)
        return model

    def _prefill(self) -> tuple[Any, Callable[[Any], Any], Reading, list[int]]:
        model, sizes = self.model, self.torch.tensor([self.settings.size.picture])
        self.decoder_begun = None
        out = model(input_ids=self.ids, pixel_values=self.pixels, image_sizes=sizes, use_cache=True, logits_to_keep=1)
        decoder_begun, cache = self.decoder_begun, out.past_key_values
        assert decoder_begun is not None

        def step(token: Any) -> Any:
            out = model(input_ids=token[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1]

        visual = [self.settings.size.visual_tokens] * self.settings.size.text["num_hidden_layers"]
        return out.logits[:, -1], step, decoder_begun, visual


class Minifocus(Side):
    """What `minifocus.generate` does from the picture's tiles to the choice of a token."""

    def __init__(self, settings: Settings, method: str):
        super().__init__(settings)
        import minifocus.llama

        self.load_model, self.cache_class = minifocus.load, minifocus.llama.LayerCache
        self.sampler, self.options = method, {}
        if method in ("vision", "focus"):
            self.options = {"selector": "variance"}
        elif method == "half":
            self.sampler, self.options = "text", {"keep": settings.size.scored_tokens // 2, "layer": 0}

    def _load(self, check_finite: bool = True) -> Any:
        own = self.settings
        return self.load_model(
            own.folder, self.sampler, own.device, own.dtype, check_finite=check_finite, **self.options
        )

    def _prefill(self) -> tuple[Any, Callable[[Any], Any], Reading, list[int]]:
        model = self.model
        pictures = model.encode_pictures([self.pixels[0]], [self.settings.size.picture], model.before_llm)
        rows, visual = model.embed(self.ids, pictures, before_llm=model.before_llm)
        del pictures
        decoder_begun = self.now()
        caches = [self.cache_class() for _ in range(model.config.text.num_hidden_layers)]
        prefill = model.prefill(rows, visual, caches)
        logits = model.language_model.lm_head(prefill.rows.hidden[:, -1])
        positions = prefill.rows.positions[:, -1]

        def step(token: Any) -> Any:
            nonlocal positions
            positions = positions + 1
            return model.language_model.lm_head(model.language_model.model.decode(token, positions, caches))

        return logits, step, decoder_begun, prefill.visual[:, 0].tolist()


def serve(connection: Any, settings: Settings, name: str) -> None:
    """A side's process: calls its methods as the parent asks for them, until it is sent None."""
    if name == "checkpoint":
        connection.send(make_checkpoint(settings))
        return
    os.environ["MINIFOCUS_BACKEND"] = "reference" if name.endswith("_reference") else "native"
    side = Transformers(settings) if name == THEIRS else Minifocus(settings, name.removesuffix("_reference"))
    with suppress(EOFError):  # the parent has gone
        while (call := connection.recv()) is not None:
            method, options = call
            connection.send(getattr(side, method)(**options))


class SideFailed(Exception):
    """A side's process ended before it answered (its traceback is on stderr), or gave another answer."""


class Worker:
    """The parent's end of a side in a fresh process."""

    def __init__(self, settings: Settings, name: str):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.connection, far_end = context.Pipe()
        self.process = context.Process(target=serve, args=(far_end, settings, name), daemon=True)
        self.process.start()
        far_end.close()  # so that the pipe ends with the process

    def ask(self, method: str, **options: Any) -> Any:
        with suppress(BrokenPipeError):  # what ended it comes out below
            self.connection.send((method, options))
        return self.answer()

    def answer(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            raise SideFailed(f"{self.name}: its process ended with status {self.process.exitcode}") from None

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self.connection.send(None)
        self.process.join()
