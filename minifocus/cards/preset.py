"""The miniature's preset: the settings that work for a model of its size."""

from __future__ import annotations

from dataclasses import replace

from ..training.presets import Preset

# The model is a thousand times smaller than the paper's, and these rates were found to work for it. Turns about one picture are
# asked independently. Scenes are drawn at random, so there is no need to shuffle them.
_INSTRUCT = Preset(
    lr_projector=1e-3,
    lr_selector=1e-5,
    lr_selector_bias=3e-3,
    lr_llm=1e-3,
    lr_lora=1e-3,
    lr_vision=0.0,
    batch=16,
    micro_batch=4,
    warmup=0.05,
    optimizer="muon",
    turns="independent",
    max_turns=12,
    shuffle=False,
    steps=500,
)
MINIATURE = {
    "align": replace(_INSTRUCT, lr_projector=2e-3, lr_selector=0.0, lr_selector_bias=0.0, lr_llm=0.0, lr_lora=0.0),
    "granularities": replace(_INSTRUCT, lr_projector=5e-4, lr_selector=0.0, lr_selector_bias=0.0, lr_llm=5e-4),
    "router": Preset(
        batch=8, micro_batch=4, lr_router=1e-3, turns="independent", max_turns=12, shuffle=False, steps=400
    ),
    "instruct": _INSTRUCT,
}
