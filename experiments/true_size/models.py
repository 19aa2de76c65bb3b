"""Published LLaVA-NeXT models as far as their config.json gives sizes, so that folders in their exact shapes can be made.

The values are those of the hub's folders of these names. Their tokenizers are not here: the folder that is made has the
miniature's, with as many tokens, and so its numbers for the first, the last and the padding token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from minifocus.loading.config import CLIP_L_336

_LLAMA = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, rms_norm_eps=1e-5)


@dataclass(frozen=True)
class Model:
    """
    name         of the hub's folder; "quick" is ours
    text         config.json's text_config
    vision       its vision_config
    image_token  the number of <image>; all tokens before it stand for text, and the next is the padding
    """

    name: str
    text: dict[str, Any]
    vision: dict[str, Any]
    image_token: int

    def with_layers(self, layers: int | None) -> Model:
        """The same with no more than so many decoder layers; None: with all of them."""
        if layers is None or layers >= self.text["num_hidden_layers"]:
            return self
        return replace(self, name=f"{self.name}-{layers}-layers", text={**self.text, "num_hidden_layers": layers})

    def config(self) -> dict[str, Any]:
        """config.json of a folder in bfloat16."""
        side = self.vision["image_size"]
        return {
            "architectures": ["LlavaNextForConditionalGeneration"],
            "model_type": "llava_next",
            "dtype": "bfloat16",
            "image_token_index": self.image_token,
            "image_grid_pinpoints": [[side * h, side * w] for h, w in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))],
            "projector_hidden_act": "gelu",
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "tie_word_embeddings": False,
            "vision_config": {"model_type": "clip_vision_model", **self.vision},
            "text_config": {**self.text, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": self.image_token + 1},
        }


MODELS = {
    model.name: model
    for model in (
        Model(
            "llava-v1.6-vicuna-7b",
            {
                **_LLAMA,
                "model_type": "llama",
                "vocab_size": 32064,
                "intermediate_size": 11008,
                "num_key_value_heads": 32,
                "max_position_embeddings": 4096,
                "rope_theta": 10000.0,
            },
            CLIP_L_336,
            32000,
        ),
        Model(
            "llava-v1.6-mistral-7b",
            {
                **_LLAMA,
                "model_type": "mistral",
                "vocab_size": 32064,
                "intermediate_size": 14336,
                "num_key_value_heads": 8,
                "max_position_embeddings": 32768,
                "rope_theta": 1000000.0,
                "sliding_window": None,
            },
            CLIP_L_336,
            32000,
        ),
        Model(
            "llama3-llava-next-8b",
            {
                **_LLAMA,
                "model_type": "llama",
                "vocab_size": 128320,
                "intermediate_size": 14336,
                "num_key_value_heads": 8,
                "max_position_embeddings": 8192,
                "rope_theta": 500000.0,
            },
            CLIP_L_336,
            128256,
        ),
    )
}
# 0.4 GB, nearly all of it the decoder's, and small pictures: for the program's own tests.
QUICK = Model(
    "quick",
    {
        "model_type": "llama",
        "vocab_size": 32064,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
    },
    dict(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=112,
        patch_size=14,
    ),
    32000,
)
