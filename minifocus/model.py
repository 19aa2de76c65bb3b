"""The multimodal model: vision tower, projector and decoder joined, with the samplers' two hooks between them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn

from . import arguments, methods
from . import generate as generation
from .errors import CheckpointError, InputError
from .files.reading import FILE, FOLDER, kind, named, present, read_bytes
from .inputs.anyres import num_visual_tokens, select_best_resolution, stitch
from .inputs.chat_template import read_chat_template
from .inputs.image_processor import ImageProcessor
from .inputs.prompt import Template, detect_template
from .inputs.tokenizer import Tokenizer
from .llama import DecoderLayer, LayerCache, Llama
from .loading.config import DTYPES, Config, load_config
from .loading.model_folder import SELECTOR, Origin, finish_save, replacing, stamps
from .loading.weights import Progress, check_storable, load_model, save_model, shapes_of, without_values
from .rows import Rows, stack_rows
from .samplers.hooks import BeforeLLM, InsideLLM, PictureFeatures, Samplers, Selection, VisualTokens, uncompressed
from .vision import Block, Projector, VisionTower

_log = logging.getLogger("minifocus")

Sizes = torch.Tensor | Sequence[Sequence[int]] | None

# What processors and tokenizers of transformers return on request beside what `Llava.forward` reads. All of it follows from
# input_ids or is of use to the caller alone; transformers' own LLaVA reads none of it.
PROCESSOR_KEYS = frozenset(
    ("mm_token_type_ids", "token_type_ids", "special_tokens_mask", "offset_mapping", "length", "assistant_masks")
)


@dataclass(frozen=True)
class Prefill:
    """What became of a batch on its way through the model.

    rows        the decoder's normed last hidden states, of the tokens that reached its end
    pictures    per row, per picture: its tokens as they entered the decoder
    selections  (layer, the rows before it, what the inside-LLM sampler kept of them), in order of layers
    first       per row, per picture: the column of its first placeholder
    visual      [L, B] int64, how many visual tokens each layer saw in each row
    full        [B] int64, how many there were before any sampler
    """

    rows: Rows
    pictures: list[list[VisualTokens]]
    selections: list[tuple[int, Rows, Selection]]
    first: list[list[int]]
    visual: torch.Tensor
    full: torch.Tensor


class Llava(nn.Module):
    """LLaVA-1.5 or LLaVA-NeXT with a sampler before its decoder, one inside it, both or none. See `minifocus.load`.

    Parameter names are those of a Hugging Face checkpoint; the samplers' own are under `before_llm`.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config)
        self.multi_modal_projector = Projector(config)
        if config.anyres:
            self.image_newline = nn.Parameter(torch.empty(config.text.hidden_size))
        self.language_model = Llama(config.text)
        self.before_llm: BeforeLLM | None = None
        self.inside_llm: InsideLLM | None = None
        self.image_processor: ImageProcessor | None = None
        self.tokenizer: Tokenizer | None = None
        self.template: Template = "vicuna"
        self._guessed: Template | None = None  # the template, if it is a guess that the log does not have yet
        self.origin = Origin()

    @property
    def folder(self) -> Path:
        """The folder that the model was loaded from."""
        return self.origin.folder

    @property
    def device(self) -> torch.device:
        return self.language_model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.lm_head.weight.dtype

    # ---- pictures → feature maps → visual tokens ----

    def num_tiles(self, size: tuple[int, int]) -> int:
        """Tiles of a picture of (h, w), the thumbnail included."""
        if not self.config.anyres:
            return 1
        height, width = select_best_resolution(size, self.config.grid_pinpoints)
        return 1 + (height // self.config.vision.image_size) * (width // self.config.vision.image_size)

    def num_visual_tokens(self, size: tuple[int, int]) -> int:
        """Uncompressed visual tokens, and so placeholders, of a picture of (h, w)."""
        vision = self.config.vision
        if not self.config.anyres:
            return vision.grid**2 + self.config.keep_cls
        return num_visual_tokens(size, self.config.grid_pinpoints, vision.image_size, vision.patch_size)

    def encode_pictures(
        self,
        tiles: Sequence[torch.Tensor],
        sizes: Sequence[tuple[int, int]],
        before_llm: BeforeLLM | None = None,
    ) -> list[PictureFeatures]:
        """Tiles of each picture [T_i, 3, S, S] and its (h, w) → its projected feature maps (paper §3.1).

        Tiles of any floating dtype and device are taken to the model's; the maps are in its dtype. T_i is `num_tiles` of
        the picture's size, else InputError. `before_llm` may take cues from the vision tower on the way.
        """
        if not tiles:
            return []
        pixels = torch.cat(list(tiles)).to(self.device, self.dtype)
        cues: list[torch.Tensor] = []

        def look(index: int, block: Block, x: torch.Tensor) -> None:
            assert before_llm is not None
            found = before_llm.look(index, block, x)
            if found is not None:
                cues.append(found)

        hidden = self.vision_tower(pixels, look if before_llm is not None else None)
        features = self.multi_modal_projector(hidden)  # [all tiles, grid² (+1), C]
        counts = [len(t) for t in tiles]
        all_cues = torch.cat(cues, dim=-1).split(counts) if cues else [None] * len(counts)
        return [
            self._picture(own, own_cues, size)
            for own, own_cues, size in zip(features.split(counts), all_cues, sizes, strict=True)
        ]

    def _picture(self, features: torch.Tensor, cues: torch.Tensor | None, size: tuple[int, int]) -> PictureFeatures:
        """The views' features [T, grid² (+1), C] and cues [T, grid², K] → maps of the picture."""
        side = self.config.vision.grid
        square = (side, side)
        if not self.config.anyres:
            leading = features[0, : features.shape[1] - side**2]  # the CLS token, if it is kept
            cells = features[0, len(leading) :].unflatten(0, square)
            seen = None if cues is None else cues[0].unflatten(0, square)
            return PictureFeatures(cells, cells, leading, None, cues=None if seen is None else (seen, seen))

        def stitched(of_views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return stitch(of_views, size, self.config.grid_pinpoints, self.config.vision.image_size)

        leading, cells = stitched(features)
        views = torch.arange(len(features), device=features.device)[:, None, None].expand(-1, side**2, 1)
        tile = stitched(views)[1].squeeze(-1)
        around = None
        if cues is not None:
            small, whole = stitched(cues)
            around = (whole, small.unflatten(0, square))
        return PictureFeatures(cells, leading.unflatten(0, square), leading, self.image_newline, tile, around)

    def embed(
        self,
        input_ids: torch.Tensor,
        pictures: Sequence[PictureFeatures],
        attention_mask: torch.Tensor | None = None,
        instruction_mask: torch.Tensor | None = None,
        before_llm: BeforeLLM | None = None,
    ) -> tuple[Rows, list[list[VisualTokens]]]:
        """Put each picture's tokens, shortened by `before_llm` where there is one, in place of its placeholders.

        input_ids [B, S] int64 on the model's device, as the masks are, with one `image_token_id` per uncompressed visual
        token; pictures in the order of their placeholders. `attention_mask` [B, S], bool or 0 and 1, is 0 for padding.
        `instruction_mask` [B, S], likewise, marks the user's question; by default all text after the row's first picture.
        Returns left-padded rows in the model's dtype, and each row's pictures. Raises InputError where pictures and
        placeholders do not fit each other, and for a row longer than the context.
        """
        rows, row_pictures = [], []
        remaining = list(pictures)
        for row, ids in enumerate(input_ids):
            columns = torch.arange(len(ids), device=self.device)
            if attention_mask is not None:
                columns = columns[attention_mask[row].bool()]
            ids = ids[columns]
            placeholder = ids == self.config.image_token_id
            if instruction_mask is None:
                instruction = ~placeholder & (placeholder.cumsum(0) > 0)
            else:
                instruction = instruction_mask[row, columns].bool() & ~placeholder
            # The placeholder's own embedding is never used, and need not exist in the table's trained part.
            embeddings = self.language_model.model.embed_tokens(ids.where(~placeholder, 0))

            places = placeholder.nonzero().squeeze(1)
            pieces: list[Rows] = []
            own: list[VisualTokens] = []
            done = used = 0
            while used < len(places):
                picture, begin = self._next_picture(remaining, places[used:], row, len(own))
                words = embeddings[instruction]
                visual = uncompressed(picture) if before_llm is None else before_llm(picture, words)
                text = slice(done, begin)
                pieces.append(_text_piece(embeddings[text], columns[text], instruction[text]))
                pieces.append(_visual_piece(visual, columns[begin + visual.source], len(own)))
                own.append(visual)
                used += picture.layout.num_tokens
                done = begin + picture.layout.num_tokens
            pieces.append(_text_piece(embeddings[done:], columns[done:], instruction[done:]))
            rows.append(_join(pieces))
            row_pictures.append(own)
        if remaining:
            raise InputError(f"pixel_values: {len(remaining)} pictures more than input_ids has placeholders for")
        longest, limit = max(row.hidden.shape[1] for row in rows), self.config.text.max_position_embeddings
        if longest > limit:
            raise InputError(
                f"the prompt with its pictures takes {longest} tokens, more than the context length of {limit}"
            )
        return stack_rows(rows), row_pictures

    def _next_picture(
        self, remaining: list[PictureFeatures], places: torch.Tensor, row: int, number: int
    ) -> tuple[PictureFeatures, int]:
        """The next picture and the place of its first placeholder, after checking that it fits the placeholders."""
        if not remaining:
            raise InputError(f"input_ids: row {row} has {len(places)} image placeholders more than the pictures fill")
        picture = remaining.pop(0)
        needed = picture.layout.num_tokens
        block = places[:needed]
        begin = int(block[0])
        if len(block) < needed or int(block[-1]) - begin != needed - 1:
            run = int((block == begin + torch.arange(len(block), device=block.device)).sum())
            raise InputError(
                f"input_ids: row {row}: picture {number} takes {needed} image placeholders in a run, got {run}"
            )
        return picture, begin

    # ---- rows through the decoder ----

    def prefill(
        self,
        rows: Rows,
        pictures: list[list[VisualTokens]],
        caches: list[LayerCache] | None = None,
        last: int | None = None,
    ) -> Prefill:
        """Run the decoder over whole rows; the inside-LLM sampler drops tokens on the way.

        With `last` 1, the hidden states of the last tokens only come back, [B, 1, C].
        """
        selections: list[tuple[int, Rows, Selection]] = []
        visual = []

        leaving: list[torch.Tensor] = []  # what a selection at the layer before keeps
        sampler = self.inside_llm if any(pictures) else None

        def before_layer(index: int, layer: DecoderLayer, rows: Rows) -> Rows:
            if leaving:
                rows = rows.keep(leaving.pop())
            selection = sampler(index, layer, rows) if sampler is not None else None
            if selection is not None:
                kept = selection.kept.clone()
                kept[:, -1] = True  # its state says the next token, though the prompt may end in a picture
                selection = replace(selection, kept=kept)
                # Without the hidden states, which would stay in memory for as long as the answer's trace.
                selections.append((index, rows.with_hidden(rows.hidden.new_empty(*rows.valid.shape, 0)), selection))
                if selection.after:
                    leaving.append(selection.kept)
                else:
                    rows = rows.keep(selection.kept)
            visual.append(((rows.picture >= 0) & rows.valid).sum(dim=1))
            return rows

        full = torch.tensor([sum(v.layout.num_tokens for v in own) for own in pictures])
        first = [[_first_column(rows, row, n, v) for n, v in enumerate(own)] for row, own in enumerate(pictures)]
        rows = self.language_model.model.prefill(rows, caches, before_layer, last)
        return Prefill(rows, pictures, selections, first, torch.stack(visual), full)

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | Sequence[torch.Tensor] | None = None,
        image_sizes: Sizes = None,
        attention_mask: torch.Tensor | None = None,
        instruction_mask: torch.Tensor | None = None,
        **unused: object,
    ) -> torch.Tensor:
        """Logits [B, S, vocabulary], inputs as transformers takes them.

        input_ids       [B, S] int64, with one placeholder per uncompressed visual token
        pixel_values    LLaVA-NeXT: [pictures, tiles, 3, side, side], zero tiles as padding, or the tiles of all pictures
                        without padding, [tiles, 3, side, side]; LLaVA-1.5: [pictures, 3, side, side]
        image_sizes     [pictures, 2], (h, w) in pixels, as a tensor or a list; LLaVA-NeXT only
        attention_mask  [B, S], 1 for tokens and 0 for padding, at either end of a row
        instruction_mask [B, S], 1 for the user's question, which guides the text-guided sampler; by default all text
                        after the row's first picture
        unused          what else a processor or tokenizer of transformers returns (`PROCESSOR_KEYS`), which says nothing more

        Rows of the result that stand for padding, or for visual tokens that a sampler took out, are NaN: no token is
        predicted there. A pooled token's logits are in the row of its window's first cell. Raises InputError.
        """
        for name in unused:
            if name not in PROCESSOR_KEYS:
                raise InputError(f"{name[:100]}: not an argument of forward")
        self._check_ids(input_ids, attention_mask, instruction_mask)
        tiles, sizes = self._split_pixels(pixel_values, image_sizes)
        input_ids = input_ids.to(self.device)
        attention_mask = None if attention_mask is None else attention_mask.to(self.device)
        instruction_mask = None if instruction_mask is None else instruction_mask.to(self.device)
        features = self.encode_pictures(tiles, sizes, self.before_llm)
        rows, pictures = self.embed(input_ids, features, attention_mask, instruction_mask, self.before_llm)
        rows = self.prefill(rows, pictures).rows
        logits = self.language_model.lm_head(rows.hidden)
        if torch.equal(rows.source, torch.arange(input_ids.shape[1], device=self.device).expand_as(input_ids)):
            return logits
        placed = logits.new_full((*input_ids.shape, logits.shape[-1]), float("nan"))
        row, column = rows.valid.nonzero(as_tuple=True)
        placed[row, rows.source[row, column]] = logits[row, column]
        return placed

    def _check_ids(self, ids: torch.Tensor, mask: torch.Tensor | None, instruction: torch.Tensor | None) -> None:
        arguments.tensor("input_ids", ids)
        if ids.dim() != 2 or ids.dtype != torch.int64 or not ids.numel():
            raise InputError(f"input_ids: expected int64 [rows, tokens], got {ids.dtype} {list(ids.shape)}")
        vocabulary = self.config.text.vocab_size
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocabulary:
            raise InputError(f"input_ids: expected numbers from 0 to {vocabulary - 1}, got {low} to {high}")
        for name, value in (("attention_mask", mask), ("instruction_mask", instruction)):
            if value is not None and arguments.tensor(name, value).shape != ids.shape:
                raise InputError(f"{name}: expected the shape of input_ids {list(ids.shape)}, got {list(value.shape)}")
        if mask is not None:
            steps = mask.bool().int().diff(dim=1, prepend=mask.new_zeros(len(mask), 1).int())
            if not bool(mask.bool().any(dim=1).all()) or bool(((steps == 1).sum(dim=1) != 1).any()):
                raise InputError(
                    "attention_mask: expected every row to have one run of ones, with padding at its ends only"
                )

    def _split_pixels(
        self, pixel_values: torch.Tensor | Sequence[torch.Tensor] | None, image_sizes: Sizes
    ) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
        """Each picture's own tiles, without the zero tiles that pad a batch, and its (h, w)."""
        if pixel_values is None:
            return [], []
        own = pixel_values if isinstance(pixel_values, list | tuple) else [pixel_values]
        floating = all(isinstance(one, torch.Tensor) and one.is_floating_point() for one in own)
        if not floating or (isinstance(pixel_values, torch.Tensor) and not pixel_values.dim()):
            got = arguments.shown(pixel_values)
            raise InputError(f"pixel_values: expected a tensor of floating-point numbers or a list of some, got {got}")
        if not len(pixel_values):
            return [], []
        side = self.config.vision.image_size
        if self.config.anyres and isinstance(pixel_values, torch.Tensor) and pixel_values.dim() == 4:
            counts = [self.num_tiles(size) for size in _picture_sizes(image_sizes)]
            if sum(counts) != len(pixel_values):
                raise InputError(f"pixel_values: expected {sum(counts)} tiles by image_sizes, got {len(pixel_values)}")
            pixel_values = pixel_values.split(counts)
        dims = 4 if self.config.anyres else 3
        shapes = [list(p.shape) for p in pixel_values]
        wrong = next((shape for shape in shapes if len(shape) != dims or shape[-3:] != [3, side, side]), None)
        if wrong is not None:
            wanted = f"[pictures, {'tiles, ' if self.config.anyres else ''}3, {side}, {side}]"
            raise InputError(f"pixel_values: expected {wanted}, got {[len(shapes), *wrong]}")
        if not self.config.anyres:
            return [p[None] for p in pixel_values], [(side, side)] * len(shapes)
        sizes = _picture_sizes(image_sizes, len(shapes))
        tiles = []
        for number, (own, size) in enumerate(zip(pixel_values, sizes, strict=True)):
            needed = self.num_tiles(size)
            if len(own) < needed:
                raise InputError(f"pixel_values: picture {number} of {size} needs {needed} tiles, got {len(own)}")
            tiles.append(own[:needed])
        return tiles, sizes

    def set_sampler(self, name: str, **options: Any) -> None:
        """Sample by another method from now on: `name` and `options` as for `load`. Raises InputError, CheckpointError."""
        method = methods.build(name, self.config, self.folder, options)
        if name in ("focus", "vision") and options.get("selector") is None and not self.origin.holds_weights():
            raise CheckpointError(f"{self.folder / SELECTOR}: is another model's: the weights beside it have changed")
        self._use(method)

    def _use(self, method: Samplers) -> None:
        self.before_llm = None if method.before is None else method.before.to(self.device).eval()
        self.inside_llm = method.inside

    def save(self, folder: str | PathLike[str], *, check_finite: bool = True) -> None:
        """Write the model as `load` takes it: weights, a learned selector, and the other files as they were when it came.

        The files of a model that is there already, of whatever kind, make room for them; other files stay. The old ones are
        what loads until the new ones are whole and on the disk, whenever the process is killed (see `model_folder`).
        Without a learned selector the folder gets none; in the model's own, one that is there stays.

        `check_finite` refuses weights with NaN or infinity, as `load` would. Raises InputError for a folder that cannot be
        written and a model that `load` would not take again, and CheckpointError where one of the files that it came with
        could not be read.
        """
        target = arguments.path("folder", folder)
        if not self.origin.companions:
            raise InputError("model: expected one that was loaded from a folder, whose config.json it is saved with")
        state = {name: value for name, value in self.state_dict().items() if not name.startswith("before_llm.")}
        check_storable(state, shapes_of(without_values(lambda: Llava(self.config))))
        try:
            with replacing(target) as fresh:
                save_model(state, self.origin.companions, fresh, self.config.tie_word_embeddings, check_finite)
                own = target.resolve() == self.folder.resolve()
                if not methods.save(self.before_llm, fresh) and own and self.origin.holds_weights():
                    selector = target / SELECTOR
                    if kind(selector) == FILE:
                        (fresh / SELECTOR).write_bytes(read_bytes(selector))
        except (OSError, SafetensorError) as error:
            raise InputError(f"{named(target)}: expected a folder that can be written: {error}") from error
        if own:
            self.origin = replace(self.origin, stamps=stamps(self.folder))

    # ---- questions and answers (generate.py) ----

    def prompt_template(self) -> Template:
        """`template`, in which its prompts are. Where that is a guess, the log is told once, before the first prompt."""
        if self._guessed is not None and self._guessed == self.template:
            _log.warning("%s: has no chat template; its prompts are in %r, as is usual", self.folder, self.template)
        self._guessed = None
        return self.template

    def generate(self, image: generation.Images, prompt: str, **options: Any) -> generation.Answer:
        """Answer one question about a picture, or about several; see `minifocus.generate.answer_batch` for options."""
        return generation.answer_batch(self, [image], [prompt], **options)[0]

    def generate_batch(
        self, images: Sequence[generation.Images], prompts: Sequence[str], **options: Any
    ) -> list[generation.Answer]:
        """Answer prompts[i] about images[i], all in one batch; the answers are those of `generate` one by one."""
        return generation.answer_batch(self, images, prompts, **options)

    def stream(self, image: generation.Images, prompt: str, **options: Any) -> generation.Stream:
        """Like `generate`, but iterate over the text as it is made; the whole answer is then in `.answer`."""
        return generation.Stream(self, image, prompt, **options)


def _picture_sizes(given: Sizes, count: int | None = None) -> list[tuple[int, int]]:
    """(h, w) of each picture; InputError where they are not, or not `count`."""
    try:
        sizes = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        sizes = torch.empty(0)
    whole = not (sizes.is_floating_point() or sizes.is_complex() or sizes.dtype == torch.bool)
    fits = whole and sizes.dim() == 2 and sizes.shape[1] == 2 and len(sizes) == (count or len(sizes))
    if not fits or not bool((sizes >= 1).all()):
        wanted = "each picture" if count is None else f"each of {count} pictures"
        raise InputError(f"image_sizes: expected positive whole (h, w) for {wanted}, got {arguments.shown(given)}")
    return [(int(h), int(w)) for h, w in sizes.tolist()]


def _first_column(rows: Rows, row: int, number: int, visual: VisualTokens) -> int:
    """Where a picture's placeholders begin in input_ids, from the first of its tokens in rows just embedded."""
    columns = rows.source[row][rows.picture[row] == number]
    return int(columns[0] - visual.source[0]) if len(columns) else 0


def _text_piece(hidden: torch.Tensor, source: torch.Tensor, instruction: torch.Tensor) -> Rows:
    none, nowhere = torch.zeros_like(instruction), torch.full_like(source, -1)
    cell, entered = nowhere[:, None].expand(-1, 2), torch.zeros_like(source)
    return Rows(hidden, ~none, source, source, nowhere, cell, entered, none, instruction)


def _visual_piece(visual: VisualTokens, source: torch.Tensor, number: int) -> Rows:
    none, layout = torch.zeros_like(visual.newline), visual.layout
    cell, picture = layout.coordinates(visual.source), torch.full_like(source, number)
    newline = visual.newline if layout.newlines else visual.source < layout.leading
    entered = (~newline).sum().expand_as(source)
    return Rows(visual.tokens, ~none, source, source, picture, cell, entered, newline, none)


def _join(pieces: list[Rows]) -> Rows:
    """Pieces of one sequence, without their batch axis → one row, with positions counted through."""
    columns = {f.name: torch.cat([getattr(piece, f.name) for piece in pieces])[None] for f in fields(Rows)}
    columns["positions"] = torch.arange(columns["source"].shape[1], device=columns["source"].device)[None]
    return Rows(**columns)


def load(
    folder: str | PathLike[str],
    sampler: str = "focus",
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    *,
    check_finite: bool = True,
    progress: Progress | None = None,
    **options: Any,
) -> Llava:
    """Load a LLaVA-1.5 or LLaVA-NeXT folder in Hugging Face's layout.

    sampler       "focus" (both of FocusLLaVA's), "vision", "text", "none", or one of the field's training-free methods
                  (`minifocus.methods.names()`); `options` are the sampler's own, such as gamma, layer, selector, ratio
    dtype         "float32", "bfloat16", "float16" or the torch dtype; None: the checkpoint's
    check_finite  refuse weights with NaN or infinity (one pass over them)
    progress      called with (bytes read, bytes in all)

    A folder without a tokenizer loads; only text asks for it. generation_config.json is followed but for sampling, beams and
    what else the log names: answers are greedy, unless `generate` is told otherwise. A save that was killed as it put its
    files in place is finished first. Raises CheckpointError for a bad folder and InputError for a bad argument.
    """
    folder = arguments.path("folder", folder)
    if kind(folder) != FOLDER:
        raise CheckpointError(f"{named(folder)}: expected the folder of a model, found {kind(folder)}")
    resolved_dtype = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(resolved_dtype, torch.dtype) and resolved_dtype in DTYPES.values()):
        raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {arguments.shown(dtype)}")
    check_finite = arguments.flag("check_finite", check_finite)
    target = usable_device(device)
    finish_save(folder)
    origin = Origin.read(folder)
    config = load_config(folder)
    method = methods.build(sampler, config, folder, options)
    processor = ImageProcessor.from_folder(
        folder, model_type=config.model_type, image_size=config.vision.image_size, grid_pinpoints=config.grid_pinpoints
    )
    has_tokenizer = any(present(folder / name) for name in ("tokenizer.json", "tokenizer.model"))
    tokenizer = Tokenizer.from_folder(folder) if has_tokenizer else None
    own = read_chat_template(folder, tuple(tokenizer.special_tokens.items()) if tokenizer is not None else ())

    model = load_model(lambda: Llava(config), config, folder, target, resolved_dtype, check_finite, progress)
    model = cast(Llava, model)
    if stamps(folder) != origin.stamps:
        raise CheckpointError(f"{folder}: its files were changed while they were read: load it again")
    model.image_processor, model.tokenizer, model.origin = processor, tokenizer, origin
    model.template = own or detect_template(tokenizer, config.text.model_type)
    model._guessed = None if own else model.template
    model._use(method)
    return model


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name, on which numbers can be kept and read. Raises InputError for any other."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which meta tensors, for one, do not have
    except (RuntimeError, AssertionError, TypeError, ValueError, OverflowError, ImportError) as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"device: {arguments.shown(name)} is not usable here: {reason}") from error
    return device
