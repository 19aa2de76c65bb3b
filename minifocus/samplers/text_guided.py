"""FocusLLaVA's text-guided sampler (paper §3.3): before decoder layer i, keep the visual tokens that the text looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .. import arguments
from ..llama import DecoderLayer, rope_tables, rotate
from ..loading.config import TextConfig
from ..ops import importance, select_top_p
from ..rows import Rows
from .hooks import Context, Selection


@dataclass(frozen=True)
class TextGuidedOptions:
    """
    gamma  share of the total importance that the kept tokens must exceed (Eq. 9), in (0, 1]; 0.85 in the paper
    keep   keep this many tokens of each picture instead (static shapes); None: by `gamma`
    layer  act before this decoder layer, from 0; None: a quarter of the depth (the paper's 8 of 32)
    text   whose attention counts: "instruction" (the user's words after the picture, without the template's; the last
           prompt token where there are none), "all" (every text token of the prompt) or "last" (the last prompt token)
    rope   score with rotary positions; as printed (Eq. 6) there are none
    """

    gamma: float = 0.85
    keep: int | None = None
    layer: int | None = None
    text: Literal["instruction", "all", "last"] = "instruction"
    rope: bool = False

    def __post_init__(self) -> None:
        keep = None if self.keep is None else arguments.whole("keep", self.keep, 1)
        text = arguments.choice("text", self.text, ("instruction", "all", "last"))
        rope = arguments.flag("rope", self.rope)
        arguments.settle(self, gamma=arguments.share("gamma", self.gamma), keep=keep, text=text, rope=rope)


class TextGuidedSampler:
    """Scores each picture's tokens at one layer and keeps the most important; newlines always stay, unscored."""

    def __init__(self, options: TextGuidedOptions, config: TextConfig):
        self.options, self.config = options, config
        depth = config.num_hidden_layers
        self.layer = arguments.whole("layer", depth // 4 if options.layer is None else options.layer, 0, depth - 1)

    def text_tokens(self, rows: Rows, row: int, picture_end: int) -> torch.Tensor:
        """The columns of `row` whose attention counts for a picture that ends before column `picture_end`."""
        last = rows.valid.new_zeros(rows.valid.shape[1])
        last[-1] = True
        if self.options.text == "last":
            chosen = last
        elif self.options.text == "all":
            chosen = (rows.picture[row] < 0) & rows.valid[row]
        else:
            chosen = rows.instruction[row].clone()
            chosen[:picture_end] = False
            if not bool(chosen.any()):
                chosen = last
        return chosen.nonzero().squeeze(1)

    @torch.no_grad()
    def __call__(self, index: int, layer: DecoderLayer, rows: Rows, context: Context) -> Selection | None:
        """Eq. 6 to 9, before the sampler's layer. Each of several pictures is scored by itself."""
        if index != self.layer:
            return None
        width = rows.valid.shape[1]
        text, visual, cu_text, cu_visual = [], [], [0], [0]  # flat places in [B × S], one item per picture
        for row, tokens in rows.pictures():
            words = self.text_tokens(rows, row, int(tokens[-1]) + 1)
            text.append(row * width + words)
            visual.append(row * width + tokens)
            cu_text.append(cu_text[-1] + len(words))
            cu_visual.append(cu_visual[-1] + len(tokens))
        if not visual:
            return None
        q_places, k_places = torch.cat(text), torch.cat(visual)
        cu_words, offsets = (torch.tensor(cu, device=q_places.device) for cu in (cu_text, cu_visual))
        scores = self.score(layer, rows, q_places, k_places, cu_words, offsets)
        index_kept, _ = select_top_p(scores, offsets, self.options.gamma, self.options.keep)

        kept = (rows.valid & ((rows.picture < 0) | rows.newline)).flatten()
        kept[k_places[index_kept]] = True
        all_scores = torch.full_like(kept, float("nan"), dtype=scores.dtype)
        all_scores[k_places] = scores
        return Selection(kept.view_as(rows.valid), all_scores.view_as(rows.valid))

    def score(
        self,
        layer: DecoderLayer,
        rows: Rows,
        words: torch.Tensor,
        tokens: torch.Tensor,
        cu_words: torch.Tensor,
        cu_tokens: torch.Tensor,
    ) -> torch.Tensor:
        """Eq. 6 to 8 before `layer`: the importance of each of `tokens` [N], float32.

        `words` [T] and `tokens` are flat places in [B × S]; item i pairs words cu_words[i] … cu_words[i + 1] - 1 with
        tokens cu_tokens[i] … cu_tokens[i + 1] - 1, all int64. A place may occur in several items.
        """
        attention, hidden = layer.self_attn, rows.hidden.flatten(0, 1)
        q = attention.split_heads(attention.q_proj(layer.input_layernorm(hidden[words]))[None])
        k = attention.split_heads(attention.k_proj(layer.input_layernorm(hidden[tokens]))[None])
        if self.options.rope:
            positions = rows.positions.flatten()
            tables = (
                rope_tables(self.config.rope, self.config.head_dim, positions[p][None], q.dtype)
                for p in (words, tokens)
            )
            (q_cos, q_sin), (k_cos, k_sin) = tables
            q, k = rotate(q, q_cos, q_sin), rotate(k, k_cos, k_sin)
        q, k = q[0].transpose(0, 1), k[0].transpose(0, 1)
        return importance(q, k, cu_words, cu_tokens, self.config.head_dim**-0.5)
