"""Presets: the settings of a stage that a run takes unless it is given others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Preset:
    """
    lr_…         peak learning rates of the projector, the selector's weights and bias, the decoder, the vision tower and
                 AVG-LLaVA's router; 0 freezes a part
    lr_lora      the decoder's, where it learns with LoRA
    batch        examples per step; micro_batch of them in a forward pass
    warmup       share of the steps over which the rates rise
    optimizer    "adamw", or "muon" for matrices between hidden states
    turns        "chat": a conversation's turns see the ones before; "independent": they do not
    max_turns    of a conversation; None: all
    shuffle      whether every pass over the data is in a new order
    steps        of the run; None: one pass over the data
    """

    batch: int
    lr_projector: float = 0.0
    lr_selector: float = 0.0
    lr_selector_bias: float = 0.0
    lr_llm: float = 0.0
    lr_vision: float = 0.0
    lr_router: float = 0.0
    lr_lora: float = 0.0
    micro_batch: int = 1
    warmup: float = 0.03
    optimizer: Literal["adamw", "muon"] = "adamw"
    turns: Literal["chat", "independent"] = "chat"
    max_turns: int | None = None
    shuffle: bool = True
    steps: int | None = None


# As the LLaVA line and the paper (§4.1) have them. The selector's weights take the paper's 1e-5: their inputs are products of
# whole feature vectors (20 ± 30 in the miniature), so that a hundred times as much throws every region from one scale to another
# within a few steps. Its bias, which the paper does not mention, moves by itself. LoRA's rate is LLaVA's own.
LLAVA = {
    "align": Preset(batch=256, lr_projector=1e-3),
    "instruct": Preset(
        batch=128,
        lr_projector=1e-5,
        lr_selector=1e-5,
        lr_selector_bias=3e-4,
        lr_llm=1e-5,
        lr_lora=2e-4,
        lr_vision=2e-6,
    ),
    # AVG-LLaVA's stages 3 and 4 (its Table 5). §4.1 gives the tower's rate as 1e-5.
    "granularities": Preset(batch=128, lr_projector=1e-5, lr_llm=1e-5, lr_lora=2e-4, lr_vision=2e-5),
    "router": Preset(batch=128, lr_router=1e-3),
}
