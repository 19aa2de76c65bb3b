"""The parts that a model is compiled in. The C++ runtime puts them together: csrc/runtime/model.cpp.

A part is a function of weights and inputs. One compiled decoder layer thus serves all layers, each with its own weights, and
the runtime knows what is between two layers: that is where the text-guided sampler acts.

picture  the tiles of a picture → features: vision tower and projector
regions  a feature map → its tokens: the vision-guided sampler
layer    a decoder layer that reads a prompt
last     the last decoder layer that does so: it makes the output of the prompt's last token alone
step     a decoder layer that reads one token more
score    the importance of visual tokens before a layer: Eq. 6 to 8
head     hidden state → logits

Shapes: S tokens, T keys, Q words, N visual tokens, C channels, D head size; a batch of 1 throughout.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.export import Dim

from ..llama import DecoderLayer, LayerCache, rope_tables
from ..load import Llava
from ..rows import Rows
from ..samplers.text_guided import TextGuidedSampler
from ..samplers.vision_guided import VisionGuidedSampler

LAYERS = "language_model.model.layers."


class Part(nn.Module, ABC):
    """A function of tensors, and of the weights of the modules in it.

    inner   what the names of its weights have before them in the part
    prefix  what they have before them in a checkpoint instead; of a decoder layer's, the layer's number follows
    """

    inner = ""
    prefix = ""

    def weights(self) -> dict[str, torch.Tensor]:
        """By the names that they have in the part, less `inner`."""
        found = [*self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False)]
        return {name.removeprefix(self.inner): value.detach() for name, value in found}

    def call(self, weights: Mapping[str, torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> Any:
        """What it gives with these weights; those that are not among them are its own."""
        return torch.func.functional_call(self, {self.inner + name: value for name, value in weights.items()}, inputs)

    @abstractmethod
    def examples(self) -> tuple[tuple[torch.Tensor, ...], tuple[dict[int, Any] | None, ...]]:
        """Inputs of forward, and for each of them its dimensions that vary."""


class PicturePart(Part):
    """Tiles [T, 3, side, side] → features [T, cells (+ 1), C]."""

    def __init__(self, model: Llava):
        super().__init__()
        self.vision_tower, self.multi_modal_projector = model.vision_tower, model.multi_modal_projector
        side = model.config.vision.image_size
        self.most = max([1, *(1 + h // side * (w // side) for h, w in model.config.grid_pinpoints)])
        self.tiles = torch.randn(min(self.most, 3), 3, side, side).to(model.dtype)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        tower = self.vision_tower
        return self.multi_modal_projector(tower.features(tower(tiles)))

    def examples(self) -> tuple[tuple[torch.Tensor, ...], tuple[dict[int, Any] | None, ...]]:
        return (self.tiles,), (None if self.most == 1 else {0: Dim("tiles", min=2, max=self.most)},)


class RegionsPart(Part):
    """A map [H, W, C] and the thumbnail [g, g', C] → tokens [n, C] and, for each region and the end, where its own begin."""

    prefix = "before_llm."

    def __init__(self, sampler: VisionGuidedSampler, model: Llava):
        super().__init__()
        self.selector = sampler.selector
        self.sampler = (sampler,)  # not a module of this one: the selector's weights have one name
        grid, channels = model.config.grid, model.config.text.hidden_size
        self.thumbnail = torch.randn(grid.rows, grid.columns, channels).to(model.dtype)

    def forward(self, x: torch.Tensor, thumbnail: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sampled = self.sampler[0].sample_map(x, thumbnail)
        return sampled.tokens, sampled.offsets

    def examples(self) -> tuple[tuple[torch.Tensor, ...], tuple[dict[int, Any] | None, ...]]:
        x = self.thumbnail.repeat(2, 3, 1)
        return (x, self.thumbnail), ({0: Dim("H", min=1, max=2**15), 1: Dim("W", min=1, max=2**15)}, None)


class _Seen:
    """Stands for a layer's cache while it reads a prompt: keeps the prompt's keys and values."""

    length = 0

    def append(self, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor | None) -> None:
        self.k, self.v = k[0].transpose(0, 1), v[0].transpose(0, 1)


class _Cached:
    """Stands for a layer's cache while it reads one token more: keys and values [T, Hkv, D] with room for it at the end."""

    length = sys.maxsize  # more than are new, whatever T is
    mask = None

    def __init__(self, k: torch.Tensor, v: torch.Tensor):
        self.k, self.v = k, v

    def append(self, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor | None) -> None:
        last = torch.tensor([self.k.shape[0] - 1])
        self.k.index_copy_(0, last, k[0].transpose(0, 1))
        self.v.index_copy_(0, last, v[0].transpose(0, 1))

    @property
    def keys(self) -> torch.Tensor:
        return self.k.transpose(0, 1)[None]

    @property
    def values(self) -> torch.Tensor:
        return self.v.transpose(0, 1)[None]


class LayerPart(Part):
    """x [1, S, C], cos and sin [1, 1, S, D / 2] → y [1, S, C] (with `last`, [1, 1, C]), keys and values [S, Hkv, D]."""

    inner, prefix = "layer.", LAYERS

    def __init__(self, model: Llava, last: bool):
        super().__init__()
        self.layer, self.last = _first_layer(model), 1 if last else None
        self.text, self.dtype = model.config.text, model.dtype

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        seen = _Seen()
        y = self.layer(x, cos, sin, cache=cast(LayerCache, seen), last=self.last)
        return y, seen.k, seen.v

    def examples(self) -> tuple[tuple[torch.Tensor, ...], tuple[dict[int, Any] | None, ...]]:
        text, count = self.text, 40
        x = torch.randn(1, count, text.hidden_size).to(self.dtype)
        tables = rope_tables(text.rope, text.head_dim, torch.arange(count)[None], self.dtype)
        tokens = Dim("S", min=2, max=max(text.max_position_embeddings, count))
        return (x, *tables), ({1: tokens}, {2: tokens}, {2: tokens})


class StepPart(LayerPart):
    """x [1, 1, C], cos and sin [1, 1, 1, D / 2], keys and values [T, Hkv, D] → y [1, 1, C]. x becomes their last row."""

    def __init__(self, model: Llava):
        super().__init__(model, last=False)

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        return self.layer(x, cos, sin, cache=cast(LayerCache, _Cached(k, v)))

    def examples(self) -> tuple[tuple[torch.Tensor, ...], tuple[dict[int, Any] | None, ...]]:
        text, count = self.text, 40
        x = torch.randn(1, 1, text.hidden_size).to(self.dtype)
        tables = rope_tables(text.rope, text.head_dim, torch.tensor([[count - 1]]), self.dtype)
        k, v = torch.randn(2, count, text.num_key_value_heads, text.head_dim).to(self.dtype)
        keys = {0: Dim("T", min=1, max=max(text.max_position_embeddings, count))}
        return (x, *tables, k, v), (None, None, None, keys, keys)


class ScorePart(Part):
    """Hidden states x [1, S, C], places of words [Q] and visual tokens [N], positions [S] → importance [N]."""

    inner, prefix = "layer.", LAYERS

    def __init__(self, sampler: TextGuidedSampler, model: Llava):
        super().__init__()
        self.layer, self.sampler, self.dtype = _first_layer(model), sampler, model.dtype

    def forward(
        self, x: torch.Tensor, words: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        unread = torch.empty(0)
        rows = Rows(x, unread, positions[None], unread, unread, unread, unread)
        ends = (torch.cat([one.new_zeros(1), one.new_full((1,), one.shape[0])]) for one in (words, tokens))
        return self.sampler.score(self.layer, rows, words, tokens, *ends)

    def examples(self) -> tuple[tuple[torch.Tensor, ...], tuple[dict[int, Any] | None, ...]]:
        text = self.sampler.config
        x = torch.randn(1, 40, text.hidden_size).to(self.dtype)
        most = max(text.max_position_embeddings, 40)
        rows, words, tokens = (Dim(name, min=1, max=most) for name in "SQN")
        inputs = (x, torch.arange(30, 37), torch.arange(3, 26), torch.arange(40))
        return inputs, ({1: rows}, {0: words}, {0: tokens}, {0: rows})


class HeadPart(Part):
    """x [1, 1, C] → logits [V], float32."""

    prefix = "language_model."

    def __init__(self, model: Llava):
        super().__init__()
        self.model = nn.ModuleDict({"norm": model.language_model.model.norm})
        self.lm_head = model.language_model.lm_head
        self.x = torch.randn(1, 1, model.config.text.hidden_size).to(model.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.model["norm"](x)[:, 0]).float()[0]

    def examples(self) -> tuple[tuple[torch.Tensor, ...], tuple[dict[int, Any] | None, ...]]:
        return (self.x,), (None,)


def _first_layer(model: Llava) -> DecoderLayer:
    """All layers compute alike, and are exported by the first."""
    return next(iter(model.language_model.model.decoder_layers()))


def parts_of(model: Llava) -> Mapping[str, Part]:
    """The parts of a model with its samplers, by name."""
    parts: dict[str, Part] = {
        "picture": PicturePart(model),
        "layer": LayerPart(model, last=False),
        "last": LayerPart(model, last=True),
        "step": StepPart(model),
        "head": HeadPart(model),
    }
    if isinstance(model.before_llm, VisionGuidedSampler):
        parts["regions"] = RegionsPart(model.before_llm, model)
    if isinstance(model.inside_llm, TextGuidedSampler):
        parts["score"] = ScorePart(model.inside_llm, model)
    return parts
