"""config.json, the tokenizer and the other files of weights/tiny that are not weights.

python -m experiments.miniature.files DIR
"""

from __future__ import annotations

from examples import command_line

if __name__ == "__main__":
    command_line.begin()

import io
import json
import re
from pathlib import Path

import sentencepiece
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from minifocus import cards
from minifocus.cards.feature_map import GRID, PATCH
from minifocus.files.locks import hold
from minifocus.inputs.image_processor import CLIP_MEAN, CLIP_STD

TOKENIZER_SEED = 40_000_000  # place in the training split of the scenes whose text it learns


def model_config(vocab_size: int, image_token: int) -> dict:
    """config.json: the smallest decoder and vision tower found to answer well."""
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "dtype": "float32",
        "image_token_id": image_token,
        "image_token_index": image_token,
        "image_seq_length": GRID * GRID,
        "image_grid_pinpoints": [list(pinpoint) for pinpoint in cards.PINPOINTS],
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,  # of four: no layer is shipped that is not used
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_channels": 3,
            "image_size": cards.TILE,
            "patch_size": PATCH,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "projection_dim": 128,
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": vocab_size - 1,
        },
    }


def processor_config() -> dict:
    """The image processor's fields, as both generations of transformers' files hold them."""
    return {
        "image_processor_type": "LlavaNextImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": cards.TILE},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": True,
        "crop_size": {"height": cards.TILE, "width": cards.TILE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "do_pad": True,
        "image_grid_pinpoints": [list(pinpoint) for pinpoint in cards.PINPOINTS],
    }


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}{% else %}{{ 'ASSISTANT: ' }}{% endif %}"
    "{% for content in message['content'] if content['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def spelled(text: str) -> str:
    """A question or answer with each word of a sign letter by letter."""
    return re.sub(r"\b[A-Z]{3,}\b", lambda word: " ".join(word[0]), text)


def write_tokenizer(folder: Path) -> Tokenizer:
    """Llama's kind of tokenizer, trained on the generator's text: byte pairs, single digits, bytes for the rest.

    Words on signs are shown to it letter by letter, so that it learns no piece for them: an answer spells what it reads.
    """
    lines = []
    for index in range(400):
        for q in cards.draw(cards.SPLITS["train"] + TOKENIZER_SEED + index, dense=index % 4 == 3).questions:
            question, answer = spelled(q.question), spelled(q.answer)
            lines += [question, f"USER: {question} ASSISTANT: {answer}"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=512,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    # The model file keeps no merges. A piece's place in the vocabulary is the rank of the merge that made it, out of
    # any two halves that are pieces themselves.
    merges = []
    for piece, index in vocab.items():
        if not (pieces.is_byte(index) or pieces.is_control(index) or pieces.is_unknown(index)):
            halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            known = [half for half in halves if half[0] in vocab and half[1] in vocab]
            merges += sorted(known, key=lambda half: (vocab[half[0]], vocab[half[1]]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ("<unk>", "<s>", "</s>", "<image>", "<pad>")  # the last two are not in tokenizer.model: 512 and 513
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "image_token": "<image>",
            "extra_special_tokens": {"image_token": "<image>"},
            "model_max_length": 2048,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "processor_class": "LlavaNextProcessor",
        },
    )
    write_json(
        folder / "special_tokens_map.json",
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "image_token": "<image>"},
    )
    return tokenizer


def write_configs(folder: Path) -> None:
    """Every file of the model folder but the weights."""
    tokenizer = write_tokenizer(folder)
    write_json(folder / "config.json", model_config(tokenizer.get_vocab_size(), tokenizer.token_to_id("<image>")))
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.token_to_id("<pad>"), "do_sample": False},
    )
    fields = processor_config()
    write_json(folder / "preprocessor_config.json", fields | {"processor_class": "LlavaNextProcessor"})
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaNextProcessor",
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
            "image_processor": fields,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


@command_line.guarded
def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument("folder", type=Path, help="model folder to write")
    folder = parser.parse_args().folder
    with hold(folder):
        write_configs(folder)


if __name__ == "__main__":
    command_line.run(main)
