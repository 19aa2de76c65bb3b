"""The network. It encodes pictures, puts them among the words of a prompt, and reads both; samplers act at two hooks.

encode_pictures → embed → prefill → logits. Shapes: B rows, S tokens, L decoder layers, C channels, g patches a tile's side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from .errors import InputError
from .inputs.anyres import stitch
from .inputs.model_inputs import num_plain_tokens, placeholder_runs
from .llama import DecoderLayer, LayerCache, Llama
from .loading.config import Config
from .rows import Rows, one_row, stack_rows
from .samplers.hooks import BeforeLLM, Context, InsideLLM, PictureFeatures, Selection, VisualTokens, Words, uncompressed
from .vision import VisionTower


@dataclass(frozen=True)
class Prefill:
    """A batch after its way through the decoder.

    rows        the decoder's normed last hidden states, of the tokens that reached its end
    pictures    per row, per picture: its tokens as they entered the decoder
    selections  (layer, the rows before it, what the inside-LLM sampler kept of them), in order of layers
    visual      [L, B] int64, how many visual tokens each layer saw in each row
    """

    rows: Rows
    pictures: list[list[VisualTokens]]
    selections: list[tuple[int, Rows, Selection]]
    visual: torch.Tensor


class LlavaNetwork(nn.Module):
    """LLaVA-1.5 or LLaVA-NeXT with a sampler before its decoder, one inside it, both or none.

    Parameter names are those of a Hugging Face checkpoint; the samplers' own are under `before_llm`.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config)
        self.multi_modal_projector = config.projector.build(config.ends)
        if config.anyres:
            self.image_newline = nn.Parameter(torch.empty(config.text.hidden_size))
        self.language_model = Llama(config.text)
        self.before_llm: BeforeLLM | None = None
        self.inside_llm: InsideLLM | None = None

    @property
    def device(self) -> torch.device:
        return self.language_model.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.model.norm.weight.dtype

    # ---- pictures → feature maps → visual tokens ----

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
        states = self.vision_tower(pixels, () if before_llm is None else before_llm.tower_blocks)
        features = self.multi_modal_projector(self.vision_tower.features(states))  # [all tiles, grid.cells (+1), C]
        cues = None if before_llm is None else before_llm.cues(self.vision_tower, states)
        if cues is not None:  # [all tiles, g², K], further channels until the maps are stitched
            cues = self.config.projector.pool_cues(cues, self.config.ends)
            features = torch.cat([features, F.pad(cues, (0, 0, features.shape[1] - cues.shape[1], 0))], dim=-1)
        counts = [len(own) for own in tiles]
        return [self._picture(own, size) for own, size in zip(features.split(counts), sizes, strict=True)]

    def _picture(self, features: torch.Tensor, size: tuple[int, int]) -> PictureFeatures:
        """The features of a picture's tiles [T, grid.cells (+1), C + K], the last K channels cues → its maps."""
        config, grid, channels = self.config, self.config.grid, self.config.text.hidden_size
        cls, cells = features.tensor_split([features.shape[1] - grid.cells], dim=1)  # a kept CLS token
        views = cells.unflatten(1, (grid.rows, grid.columns))
        whole, leading = views[0], cls[0]
        if config.anyres:
            whole = stitch(cells, size, config.grid_pinpoints, config.vision.image_size, grid)
            leading = cells[0]
        cues = (whole[..., channels:], views[0, ..., channels:]) if features.shape[-1] > channels else None
        whole, views, leading = (one[..., :channels].to(self.dtype) for one in (whole, views, leading))
        newline, plain = self.image_newline if config.anyres else None, num_plain_tokens(config, size)
        return PictureFeatures(whole, views[0], leading, newline, cues, views, size, plain)

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
        rows, row_pictures, remaining = [], [], list(pictures)
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

            nowhere, no = torch.full_like(columns, -1), torch.zeros_like(placeholder)
            text = (embeddings, columns, nowhere, no, instruction)
            pieces: list[tuple[torch.Tensor, ...]] = []
            own: list[VisualTokens] = []
            done = 0
            for begin in placeholder_runs(placeholder, [p.layout.num_tokens for p in remaining], row):
                picture, words = remaining.pop(0), Words(embeddings[instruction], embeddings[~placeholder])
                visual = uncompressed(picture) if before_llm is None else before_llm(picture, words)
                source = columns[begin] + visual.source
                number, none = torch.full_like(source, len(own)), torch.zeros_like(source, dtype=torch.bool)
                pieces.append(tuple(column[done:begin] for column in text))
                pieces.append((visual.tokens, source, number, visual.layout.unscored(visual.source), none))
                own.append(replace(visual, begin=int(columns[begin])))
                done = begin + picture.layout.num_tokens
            pieces.append(tuple(column[done:] for column in text))
            rows.append(one_row(pieces))
            row_pictures.append(own)
        if remaining:
            raise InputError(f"pixel_values: {len(remaining)} pictures more than input_ids has placeholders for")
        longest, limit = max(row.hidden.shape[1] for row in rows), self.config.text.max_position_embeddings
        if longest > limit:
            raise InputError(
                f"the prompt with its pictures takes {longest} tokens, more than the context length of {limit}"
            )
        return stack_rows(rows), row_pictures

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
        visual: list[torch.Tensor] = []
        sampler = self.inside_llm if any(pictures) else None
        context = Context(pictures)

        def before_layer(index: int, layer: DecoderLayer, rows: Rows) -> Rows:
            nonlocal context
            if sampler is not None:
                selection = sampler(index, layer, rows, context)
                if selection is not None:
                    kept = selection.kept.clone()
                    kept[:, -1] = True  # its state says the next token, though the prompt may end in a picture
                    # Without the hidden states, which would stay in memory for as long as the answer's trace.
                    bare = rows.with_hidden(rows.hidden.new_empty(*rows.valid.shape, 0))
                    selections.append((index, bare, replace(selection, kept=kept)))
                    rows = rows.keep(kept)
                context = replace(context, previous=(layer, rows))
            visual.append(((rows.picture >= 0) & rows.valid).sum(dim=1))
            return rows

        rows = self.language_model.model.prefill(rows, caches, before_layer, last)
        return Prefill(rows, pictures, selections, torch.stack(visual))

    def logits(
        self,
        input_ids: torch.Tensor,
        tiles: Sequence[torch.Tensor],
        sizes: Sequence[tuple[int, int]],
        attention_mask: torch.Tensor | None = None,
        instruction_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Rows]:
        """Encode, embed and prefill: logits [B, T, vocabulary] of the T tokens that reach the decoder's end, and these tokens."""
        pictures = self.encode_pictures(tiles, sizes, self.before_llm)
        rows, visual = self.embed(input_ids, pictures, attention_mask, instruction_mask, self.before_llm)
        rows = self.prefill(rows, visual).rows
        return self.language_model.lm_head(rows.hidden), rows
