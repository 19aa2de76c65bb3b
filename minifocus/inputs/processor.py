"""Turn pictures and a question into what a model reads: tiles, and token ids with a placeholder for every visual token."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from ..arguments import shown
from ..errors import CheckpointError, InputError
from ..files.reading import present
from ..loading.config import Config
from .chat_template import read_chat_template
from .image_processor import ImageProcessor
from .model_inputs import num_visual_tokens
from .open_image import open_image
from .prompt import Template, build_prompt, detect_template, encode_prompt
from .tokenizer import Encoding, Tokenizer

_log = logging.getLogger("minifocus")

Picture = str | PathLike[str] | Image.Image
Images = Picture | Sequence[Picture] | None


@dataclass(frozen=True)
class ModelInput:
    """One prompt of S tokens.

    input_ids    [S] int64, with one placeholder for each uncompressed visual token
    instruction  [S] bool, the user's own words
    tiles, sizes of its pictures: [T_i, 3, side, side] and (h, w) each
    """

    input_ids: torch.Tensor
    instruction: torch.Tensor
    tiles: list[torch.Tensor]
    sizes: list[tuple[int, int]]


def pad_left(inputs: Sequence[ModelInput]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, attention_mask and instruction_mask [B, S] of B prompts."""
    longest = max(len(one.input_ids) for one in inputs)
    ids, instruction = [one.input_ids for one in inputs], [one.instruction for one in inputs]
    mask = [torch.ones_like(one) for one in instruction]
    ids, mask, instruction = ([F.pad(c, (longest - len(c), 0)) for c in one] for one in (ids, mask, instruction))
    return torch.stack(ids), torch.stack(mask), torch.stack(instruction)


def guides(span: tuple[int, int], offsets: tuple[int, int]) -> bool:
    """Whether a token with these `offsets` in a text is, in part at least, of the words in `span`: of the instruction."""
    return offsets[0] < offsets[1] and offsets[0] < span[1] and offsets[1] > span[0]


@dataclass
class Processor:
    """A folder's picture processor, tokenizer and template.

    tokenizer  None for a folder without one: only text asks for it
    template   in which prompts are written
    guessed    whether `template` is a guess that the log does not have yet
    """

    folder: Path
    config: Config
    image_processor: ImageProcessor
    tokenizer: Tokenizer | None
    template: Template
    guessed: bool = False

    @classmethod
    def from_folder(cls, folder: Path, config: Config) -> Processor:
        """Raises CheckpointError for files that are malformed or do not fit `config`."""
        image_processor = ImageProcessor.from_folder(
            folder,
            model_type=config.model_type,
            image_size=config.vision.image_size,
            grid_pinpoints=config.grid_pinpoints,
        )
        has_tokenizer = any(present(folder / name) for name in ("tokenizer.json", "tokenizer.model"))
        tokenizer = Tokenizer.from_folder(folder) if has_tokenizer else None
        own = read_chat_template(folder, tuple(tokenizer.special_tokens.items()) if tokenizer is not None else ())
        template = own or detect_template(tokenizer, config.text.model_type)
        return cls(folder, config, image_processor, tokenizer, template, guessed=own is None)

    def prompt_template(self) -> Template:
        """`template`. Where it is a guess, the log is told once, before the first prompt."""
        if self.guessed:
            _log.warning("%s: has no chat template; its prompts are in %r, as is usual", self.folder, self.template)
            self.guessed = False
        return self.template

    @property
    def text_tokenizer(self) -> Tokenizer:
        """`tokenizer`; CheckpointError where the folder has none."""
        if self.tokenizer is None:
            raise CheckpointError(f"{self.folder}: has no tokenizer.json or tokenizer.model, which text needs")
        return self.tokenizer

    def stop_token_ids(self) -> set[int]:
        """The checkpoint's end-of-sequence tokens, and those with which chat templates end a turn."""
        tokenizer = self.text_tokenizer
        ids: set[int | None] = set(self.config.eos_token_ids) or {tokenizer.eos_token_id}
        ids |= {tokenizer.token_id(token) for token in ("<|eot_id|>", "<|im_end|>")}
        return {token for token in ids if token is not None}

    def check_places(self, encoding: Encoding, num_images: int) -> None:
        """Whether a text's tokens have one placeholder for each of its pictures. Raises CheckpointError."""
        if num_images and encoding.ids.count(self.config.image_token_id) != num_images:
            raise CheckpointError(
                f"{self.folder}: the tokenizer's <image> is not config.json's image token {self.config.image_token_id}"
            )

    def __call__(self, images: Images, prompt: str, template: Template | None = None) -> ModelInput:
        """Prepare a question about a picture (a path or a PIL image), several, or none (None). Raises InputError."""
        if not isinstance(prompt, str):
            raise InputError(f"prompt: expected text, got {type(prompt).__name__}")
        sources, config = _as_list(images), self.config
        built = build_prompt(prompt, len(sources), template or self.prompt_template())
        tiles, sizes = [], []
        for source in sources:
            pixels, size = self.image_processor(open_image(source))
            tiles.append(pixels)
            sizes.append(size)
        encoding = encode_prompt(self.text_tokenizer, built.text)
        limit = config.text.max_position_embeddings
        if not encoding.ids:
            raise InputError(f"prompt: {shown(prompt)} has no tokens")
        if len(encoding.ids) > limit:
            raise InputError(f"prompt: takes {len(encoding.ids)} tokens, more than the context length of {limit}")
        if max(encoding.ids) >= config.text.vocab_size:
            raise CheckpointError(
                f"{self.folder}: the tokenizer gives token {max(encoding.ids)}, but config.json's vocab_size is "
                f"{config.text.vocab_size}"
            )
        self.check_places(encoding, len(sources))
        counts = iter([num_visual_tokens(config, size) for size in sizes])
        ids: list[int] = []
        instruction: list[bool] = []
        for token, offsets in zip(encoding.ids, encoding.offsets, strict=True):
            is_image = bool(sources) and token == config.image_token_id
            repeats = next(counts) if is_image else 1
            ids += [token] * repeats
            instruction += [not is_image and guides(built.instruction, offsets)] * repeats
        return ModelInput(torch.tensor(ids), torch.tensor(instruction), tiles, sizes)


def _as_list(images: Images) -> list[Picture]:
    if images is None:
        return []
    if isinstance(images, str | PathLike | Image.Image):
        return [images]
    if isinstance(images, list | tuple):
        return list(images)
    raise InputError(f"image: expected a path, a PIL image or a list of them, got {type(images).__name__}")
