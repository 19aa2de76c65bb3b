"""Folders as the original LLaVA repositories write them: the converted model is the same one, or the folder is refused.

The folders are random, written by the tables in tests/original_checkpoints.py. The oracles are transformers' models with the same
weights and, for LLaVA-STF's projector, which transformers lacks, the rule written out here.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import original_checkpoints as originals
import pytest
import torch
import torch.nn.functional as F
from checkpoints import IMAGE_TOKEN, make_inputs
from example_scripts import example
from original_checkpoints import BLOCKS, FUSED, KINDS, TOWER, VISION, VOCABULARY, C, D, Original
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

import minifocus
from minifocus.avg_llava.sampler import AVGLLaVA
from minifocus.inputs.prompt import build_conversation
from minifocus.inputs.tokenizer import Tokenizer
from minifocus.original_llava import convert
from minifocus.original_llava.names import fused_layers

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the user's questions."
)


@pytest.fixture(scope="module")
def tokenizer_model() -> bytes:
    return originals.sentencepiece_model()


@pytest.fixture
def make(tokenizer_model: bytes) -> Callable[..., Original]:
    return lambda kind, **options: originals.make(kind, tokenizer_model, **options)


def converted(original: Original, place: Path, **options: Any) -> Path:
    """Written with the tower in its weights, converted with the tower's sizes beside it."""
    tower = original.write_tower(place / "clip", values=False)
    convert(original.write(place / "original"), place / "new", tower, **options)
    return place / "new"


# ------------------------------------------------------------------------------------------------------ the same model


def text_config(vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size, hidden_size=D, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=4096,
    )  # fmt: skip


def transformers_logits(original: Original, inputs: Any) -> torch.Tensor:
    """The logits of transformers' model with the same weights; its image token's row of embeddings is of zeros."""
    anyres = original.kind in ("llava_next", "avg")
    kinds: Any = (
        (LlavaNextConfig, LlavaNextForConditionalGeneration) if anyres else (LlavaConfig, LlavaForConditionalGeneration)
    )
    pinpoints = {"image_grid_pinpoints": [[h, w] for w, h in originals.PINPOINTS]} if anyres else {}
    config = kinds[0](
        text_config=text_config(VOCABULARY + 1),
        vision_config=CLIPVisionConfig(**VISION),
        image_token_index=VOCABULARY,
        **pinpoints,
    )
    model, state = kinds[1](config).eval(), {}
    for name, value in original.tensors.items():
        if name.startswith("model.router."):
            continue
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            value = torch.cat([value, torch.zeros(1, D)])
        if name.startswith(TOWER):
            name = f"model.vision_tower.{name[len(TOWER) :]}"
        elif name.startswith("model.mm_projector."):
            number = {"0": "1", "2": "2"}[name.split(".")[2]]
            name = f"model.multi_modal_projector.linear_{number}.{name.split('.')[3]}"
        elif name not in ("model.image_newline", "lm_head.weight"):
            name = f"model.language_model.{name.removeprefix('model.')}"
        state[name] = value
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        return model(**inputs.arguments()).logits[..., :VOCABULARY]


def same(ours: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor) -> None:
    seen = mask.bool()
    assert expected[seen].std() > 0.3
    torch.testing.assert_close(ours[seen], expected[seen], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", ["llava", "llava_next", "avg"])
@pytest.mark.parametrize("layout, shards", [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 3)])
def test_logits_equal_transformers(make: Any, tmp_path: Path, kind: str, layout: str, shards: int) -> None:
    """In every format, with the tower in the weights and with one beside them, which may be of either kind of folder."""
    original = make(kind)
    if layout == "bin":
        source = original.write(tmp_path / "original", layout, shards, tower=False)
        tower = original.write_tower(tmp_path / "clip", "bin", whole=shards == 1)
    else:
        source = original.write(tmp_path / "original", layout, shards)
        tower = original.write_tower(tmp_path / "clip", values=False)
    convert(source, tmp_path / "new", tower)
    model = minifocus.load(tmp_path / "new", "none")
    assert model.config.image_token_id == VOCABULARY and model.config.text.vocab_size == VOCABULARY + 1
    inputs = make_inputs(model, [[(40, 60)], [(28, 28), (90, 30)]])
    inputs.input_ids[inputs.input_ids == IMAGE_TOKEN] = VOCABULARY
    with torch.no_grad():
        ours = model(**inputs.arguments())[..., :VOCABULARY]
    same(ours, transformers_logits(original, inputs), inputs.attention_mask)


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_transformers_loads_it_too(make: Any, tmp_path: Path, kind: str) -> None:
    folder = converted(make(kind), tmp_path)
    classes: Any = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}
    ours, theirs = minifocus.load(folder, "none"), classes[kind].from_pretrained(folder)
    inputs = make_inputs(ours, [[(40, 60)]])
    inputs.input_ids[inputs.input_ids == IMAGE_TOKEN] = VOCABULARY
    with torch.no_grad():
        same(ours(**inputs.arguments()), theirs(**inputs.arguments()).logits, inputs.attention_mask)


def stf_logits(original: Original, before: list[int], pixels: torch.Tensor, after: list[int]) -> torch.Tensor:
    """LLaVA-STF by hand: the released code's projector over transformers' tower, before transformers' decoder."""
    tensors = original.tensors
    tower = CLIPVisionModel(CLIPVisionConfig(**VISION)).eval()
    keys = {name.removeprefix("vision_model."): name for name in tower.state_dict()}
    tower.load_state_dict({keys[n[len(TOWER) :]]: v for n, v in tensors.items() if n.startswith(TOWER)}, strict=True)
    decoder = LlamaForCausalLM(text_config(VOCABULARY)).eval()
    own = {n: v for n, v in tensors.items() if not n.startswith(TOWER) and "mm_projector" not in n}
    decoder.load_state_dict(own, strict=True)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ tensors[f"model.{name}.weight"].T + tensors[f"model.{name}.bias"]

    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
        joined = torch.cat([states[layer][:, 1:] for layer in FUSED], dim=-1)
        fused = linear("mm_projector_crosslayer.2", F.gelu(linear("mm_projector_crosslayer.0", joined)))[0]
        windows = []
        for row in range(0, 4, 2):
            for column in range(0, 4, 2):
                cells = [fused[(row + i) * 4 + column + j] for i in range(2) for j in range(2)]
                windows.append(
                    torch.stack(cells, dim=1).flatten()
                )  # all four cells of a channel, then the next channel
        visual = linear("mm_projector.2", F.gelu(linear("mm_projector.0", torch.stack(windows))))
        embed = tensors["model.embed_tokens.weight"]
        return decoder(inputs_embeds=torch.cat([embed[before], visual, embed[after]])[None]).logits


@pytest.mark.parametrize("layout, shards", [("safetensors", 1), ("bin", 2)])
def test_stf_equals_its_rule(make: Any, tmp_path: Path, layout: str, shards: int) -> None:
    original = make("stf")
    source = original.write(tmp_path / "original", layout, shards)
    convert(source, tmp_path / "new", original.write_tower(tmp_path / "clip", values=False))
    model = minifocus.load(tmp_path / "new", "none")
    assert model.config.feature_layers == tuple(FUSED)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    before, after = [1, 7, 8], [9, 10, 11, 12]
    ids = torch.tensor([before + [VOCABULARY] * model.num_visual_tokens((28, 28)) + after])
    with torch.no_grad():
        ours = model(ids, pixels)[..., :VOCABULARY]
    expected = stf_logits(original, before, pixels, after)
    assert ours.shape == expected.shape == (1, 11, VOCABULARY)
    same(ours, expected, torch.ones(1, 11))


def test_the_states_that_are_fused() -> None:
    assert fused_layers(-2, 24) == [23, 21, 18, 15, 12, 9, 6, 3]
    assert fused_layers(-1, 24) == [24, 21, 18, 15, 12, 9, 6, 3]
    assert fused_layers(-2, 8) == [7, 6, 3] and fused_layers(-2, 7) == [6, 3] and fused_layers(-2, 2) == [1]


@pytest.mark.parametrize("window", [1, 4])
def test_another_window(make: Any, tmp_path: Path, window: int) -> None:
    original = make("stf")
    joined = window**2 * C
    shapes = {"model.mm_projector.0.weight": (4 * joined, joined), "model.mm_projector.0.bias": (4 * joined,)}
    original.tensors |= originals.random_tensors({**shapes, "model.mm_projector.2.weight": (D, 4 * joined)})
    model = minifocus.load(converted(original, tmp_path), "none")
    assert model.num_visual_tokens((28, 28)) == (4 // window) ** 2


def test_a_router_lies_beside_the_model(make: Any, tmp_path: Path) -> None:
    original = make("avg")
    folder = converted(original, tmp_path)
    expected = {
        n.removeprefix("model.router."): v for n, v in original.tensors.items() if n.startswith("model.router.")
    }
    found = load_file(folder / "router.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    with safe_open(folder / "router.safetensors", "pt") as stored:
        assert stored.metadata() == {
            "format": "minifocus-router",
            "granularities": "1,2,4,8,16",
            "filtered_text": "6",
            "attention": "views",
            "text": "prompt",
            "crop": "released",
        }
    model = minifocus.load(folder, "avg-llava")
    router = model.before_llm
    assert isinstance(router, AVGLLaVA) and router.granularities == (1, 2, 4, 8, 16)
    answer = model.generate(Image.new("RGB", (40, 30), "green"), "What is it?", max_new_tokens=2)
    (choice,) = {int(number) for picture in answer.pictures for number in picture.choice.flatten()}
    model.set_sampler("avg-llava", granularity=router.granularities[choice], crop="released")
    assert model.generate(Image.new("RGB", (40, 30), "green"), "What is it?", max_new_tokens=2).tokens == answer.tokens
    convert(make("llava").write(tmp_path / "plain"), folder, tmp_path / "clip")
    assert not (folder / "router.safetensors").exists()  # it was the other model's


def test_a_router_that_is_not_used(make: Any, tmp_path: Path) -> None:
    """AVG-LLaVA before its last stage is a LLaVA-NeXT. A router that is there is taken; one that is asked for is missed."""
    original = make("avg")
    original.config["router_select"] = False
    assert (converted(original, tmp_path / "unused") / "router.safetensors").exists()
    original.tensors = {name: value for name, value in original.tensors.items() if not name.startswith("model.router.")}
    assert not (converted(original, tmp_path / "none") / "router.safetensors").exists()
    original.config["router_select"] = True
    refused(original, tmp_path / "missed", "missing: model.router.merger", "model.router.voter")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_keep_their_dtype(make: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    original = make("avg")
    original.tensors = {name: value.to(dtype) for name, value in original.tensors.items()}
    original.config["torch_dtype"] = str(dtype).removeprefix("torch.")
    folder = converted(original, tmp_path, shard_bytes=20_000)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3 and all(value.dtype == dtype for file in files for value in load_file(file).values())
    assert minifocus.load(folder, "none").dtype == dtype


def test_tied_embeddings(make: Any, tmp_path: Path) -> None:
    original = make("llava")
    original.config["tie_word_embeddings"] = True
    del original.tensors["lm_head.weight"]
    model = minifocus.load(converted(original, tmp_path / "without"), "none")
    assert model.language_model.lm_head.weight is model.language_model.model.embed_tokens.weight
    original.tensors["lm_head.weight"] = original.tensors["model.embed_tokens.weight"].clone()
    assert minifocus.load(converted(original, tmp_path / "with"), "none").config.tie_word_embeddings
    original.tensors["lm_head.weight"] += 1
    refused(original, tmp_path / "other", "tie_word_embeddings", "lm_head.weight")


def test_a_known_tower_needs_no_folder(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minifocus.original_llava.config._TOWERS", {"clip-vit-large-patch14-336": VISION})
    convert(make("avg").write(tmp_path / "original"), tmp_path / "new")
    minifocus.load(tmp_path / "new", "none")


def test_the_published_tower_s_sizes() -> None:
    from minifocus.original_llava.config import _TOWERS

    published = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    for name, size in (("clip-vit-large-patch14-336", 336), ("clip-vit-large-patch14", 224)):
        shared = {key: getattr(published, key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
        assert _TOWERS[name] == {**shared, "intermediate_size": 4096, "patch_size": 14, "image_size": size}


def test_mistral(make: Any, tmp_path: Path) -> None:
    original = make("llava_next")
    original.config |= {"model_type": "llava_mistral", "sliding_window": None, "rope_theta": 1e6}
    model = minifocus.load(converted(original, tmp_path), "none")
    assert (model.config.text.model_type, model.config.text.rope.rope_theta) == ("mistral", 1e6)
    text, _ = build_conversation([("Q", 1, "A"), ("R", 0, "B")], model.template, ["</s>"], "</s>")
    assert text == "[INST] <image> \nQ [/INST] A </s>[INST] R [/INST] B </s>"


# ----------------------------------------------------------------------------------------------- pictures and questions


def test_pictures_are_prepared_as_for_training(make: Any, tmp_path: Path) -> None:
    """CLIP's own settings where its folder has them; LLaVA-1.5 pads to a square, LLaVA-1.6 has its width first."""
    clip = {"crop_size": 28, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 28}
    clip |= {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.3, 0.2, 0.1],
    }
    for kind in ("llava", "llava_next"):
        place = tmp_path / kind
        original = make(kind)
        tower = original.write_tower(place / "clip", values=False)
        (tower / "preprocessor_config.json").write_text(json.dumps(clip))
        processor = minifocus.load(converted(original, place), "none").image_processor
        assert processor.mean == (0.4, 0.5, 0.6) and processor.std == (0.3, 0.2, 0.1)
        assert processor.pad == (kind == "llava")
    assert processor.grid_pinpoints == ((56, 28), (28, 56), (56, 56), (28, 84), (112, 28))
    original = make("stf")
    original.config["image_aspect_ratio"] = "square"
    processor = minifocus.load(converted(original, tmp_path / "square"), "none").image_processor
    assert not processor.pad and processor.mean[0] == 0.48145466


def tokenizers_folder(model: bytes, folder: Path, legacy: bool) -> None:
    """tokenizer.json in place of tokenizer.model: the same pieces, and as many special tokens."""
    import sentencepiece
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Library
    from transformers.tokenization_utils_base import generate_merges

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    merges = generate_merges(vocabulary)
    library = Library(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        library.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    library.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    (folder / "tokenizer.model").unlink()
    library.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("files", ["model", "model with a decoder", "json", "json with a decoder"])
def test_questions_are_asked_as_in_training(make: Any, tmp_path: Path, legacy: bool, files: str) -> None:
    """The ids are those of their code, which tokenizes what is around a picture apart; those of other text are as before."""
    original = make("llava", legacy=legacy)
    source = original.write(tmp_path / "original")
    if files.endswith("decoder"):
        settings = json.loads((source / "tokenizer_config.json").read_text())
        token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        decoder = {str(i): {"content": c, **token} for i, c in enumerate(("<unk>", "<s>", "</s>"))}
        settings |= {"added_tokens_decoder": decoder, "chat_template": "of the language model"}
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    if files.startswith("json"):
        tokenizers_folder(original.files["tokenizer.model"], source, legacy)
    convert(source, tmp_path / "new", original.write_tower(tmp_path / "clip", values=False))
    model, old = minifocus.load(tmp_path / "new", "none"), Tokenizer.from_folder(source)
    assert model.tokenizer is not None and model.tokenizer.token_id("<image>") == VOCABULARY == old.vocab_size
    for text in ("what is on the red card?", " two  spaces\n", "é <s> x</s>y", "", f"{SYSTEM} USER: "):
        assert model.tokenizer.encode(text).ids == old.encode(text).ids
    assert model.tokenizer.decode([VOCABULARY, 300]) == old.decode([300])

    before, after = f"{SYSTEM} USER: ", "\nwhat is on the card? ASSISTANT:"
    theirs = [*old.encode(before).ids, *[VOCABULARY] * 16, *old.encode(after).ids[1:]]
    asked = model.processor(Image.new("RGB", (40, 30)), "what is on the card?")
    assert asked.input_ids.tolist() == theirs
    text, turns = build_conversation([("what?", 1, "red"), ("is it?", 0, "is")], model.template, ["</s>"], "</s>")
    gap = text[text.index("<image>") + 7 : text.index("\n")]
    assert text == f"{SYSTEM} USER: <image>{gap}\nwhat? ASSISTANT: red</s>USER: is it? ASSISTANT: is</s>"
    first, second = text.split(f"<image>{gap}")
    theirs = [*old.encode(first).ids, VOCABULARY, *old.encode(second).ids[1:]]
    assert model.tokenizer.encode(text).ids == theirs and text[turns[1].asked : turns[1].ended] == " is</s>"


@pytest.mark.parametrize("template", ["vicuna_v1", "mistral", "chatml"])
def test_templates_write_what_the_named_ones_do(make: Any, tmp_path: Path, template: str) -> None:
    model = minifocus.load(converted(make("llava", legacy=True), tmp_path, template=template), "none")
    for turns in ([("Q", 1, "A")], [("Q", 2, "A"), ("R <image>\nit", 1, "B")]):
        own, spans = build_conversation(turns, model.template, ["</s>", "<|im_end|>"], "</s>")
        named, expected = build_conversation(
            turns, template, ["</s>", "<|im_end|>"], " </s>" if template == "mistral" else "</s>"
        )
        assert own == named and [s.instruction for s in spans] == [s.instruction for s in expected]


def test_a_padded_vocabulary_has_room(make: Any, tmp_path: Path) -> None:
    """A tokenizer with fewer tokens than there are embeddings: the next number is of one that nothing uses."""
    original = make("llava")
    original.config["vocab_size"] = VOCABULARY + 8
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        original.tensors[name] = torch.cat([original.tensors[name], torch.ones(8, D)])
    config = minifocus.load(converted(original, tmp_path), "none").config
    assert (config.image_token_id, config.text.vocab_size) == (VOCABULARY, VOCABULARY + 8)


def test_tokens_of_one_s_own(make: Any, tmp_path: Path) -> None:
    """A folder whose tokenizer has more tokens, `<image>` among them."""
    original = make("llava")
    original.files["added_tokens.json"] = json.dumps({"<pad>": 320, "<image>": 321}).encode()
    model = minifocus.load(converted(original, tmp_path), "none")
    assert (model.config.image_token_id, model.config.text.vocab_size) == (321, 322)
    rows = model.language_model.model.embed_tokens.weight
    mean = original.tensors["model.embed_tokens.weight"].mean(0)
    torch.testing.assert_close(rows[320:], mean.expand(2, -1))


def test_generation_config_goes_with_it(make: Any, tmp_path: Path) -> None:
    original = make("llava")
    assert minifocus.load(converted(original, tmp_path / "a"), "none").config.generation.max_length == 4096
    del original.files["generation_config.json"]
    config = minifocus.load(converted(original, tmp_path / "b"), "none").config
    assert config.eos_token_ids == (2,) and config.generation.max_length is None


# -------------------------------------------------------------------------------------------------------------- refused


def refused(original: Original, place: Path, *parts: str, tower: bool = True, **options: Any) -> str:
    """One CheckpointError of one model, with every part in its text; nothing is left where the new folder would be."""
    clip = original.write_tower(place / "clip", values=False) if tower else None
    source = original.write(place / "original", **options)
    with pytest.raises(minifocus.CheckpointError) as error:
        convert(source, place / "made" / "new", clip)
    text = str(error.value)
    assert all(part in text for part in parts), text
    assert not (place / "made").exists() and len(text) < 4000
    return text


def some_at_once(kind: str) -> list[list[str]]:
    """Every name but those of a second and further layer: at most 20 together, all of which an error lists.

    A projector's are alone, as more is read from them, and neighbours are apart, so that a part never is wrong as a whole.
    """
    names = [name for name in originals.shapes_of(kind) if not re.search(r"layers\.(?!0\.)\d", name)]
    alone, rest = ([name for name in names if ("mm_projector" in name) == of_one] for of_one in (True, False))
    count = -(-len(rest) // 20)
    return [*([name] for name in alone), *(rest[first::count] for first in range(count))]


@pytest.mark.parametrize("kind", ["avg", "stf"])
def test_every_tensor_is_missed(make: Any, tmp_path: Path, kind: str) -> None:
    original = make(kind)
    tensors = original.tensors
    for names in some_at_once(kind):
        original.tensors = {key: value for key, value in tensors.items() if key not in names}
        assert refused(original, tmp_path, f"missing: {', '.join(sorted(names))}").count("\n") == 1, names
    original.tensors = {
        key: value for key, value in tensors.items() if "router" not in key or key == "model.router.voter"
    }
    if kind == "avg":
        refused(original, tmp_path, "model.router.merger.linear1.bias, ", "model.router.norm.weight")


@pytest.mark.parametrize("kind", ["avg", "stf"])
def test_every_shape_is_checked(make: Any, tmp_path: Path, kind: str) -> None:
    original = make(kind)
    tensors = original.tensors
    for names in some_at_once(kind):
        for change in (lambda value: value.repeat(2, *[1] * (value.dim() - 1)), lambda value: value.flatten()[:-1]):
            others = {name: change(tensors[name]) for name in names}
            original.tensors = {**tensors, **others}
            shapes = [(name, str(tuple(other.shape))) for name, other in others.items()]
            if len(names) == 1:
                refused(original, tmp_path, *shapes[0])
            else:
                found = [f"{name}: expected {tuple(tensors[name].shape)}, found {shape}" for name, shape in shapes]
                refused(original, tmp_path, *found)


@pytest.mark.parametrize(
    "kind, name",
    [
        ("llava", "model.image_newline"),
        ("llava", "model.vision_resampler.x"),
        ("llava_next", "model.mm_projector.4.weight"),
        ("stf", "model.image_newline"),
        ("stf", "model.mm_projector_crosslayer.4.weight"),
        ("avg", "model.router.router.4.weight"),
        ("avg", f"{TOWER}head.weight"),
        ("avg", "x" * 5000),
    ],
)
def test_nothing_is_left_over(make: Any, tmp_path: Path, kind: str, name: str) -> None:
    original = make(kind)
    original.tensors[name] = torch.ones(D)
    refused(original, tmp_path, "unexpected: ", name[:100])


@pytest.mark.parametrize(
    "kind, changes, parts",
    [
        ("llava", {"model_type": "llava_mpt"}, ["model_type", "llava_llama", "'llava_mpt'"]),
        ("llava", {"hidden_size": "32"}, ["hidden_size: expected a whole number", "'32'"]),
        ("llava", {"num_hidden_layers": 10**6}, ["model.layers.*", "1000000", "3"]),
        ("llava", {"num_hidden_layers": 2}, ["model.layers.*", "2 layers", "3"]),
        ("llava", {"hidden_act": "tanh2"}, ["hidden_act"]),
        ("llava", {"rope_scaling": {"type": "yarn", "factor": 2}}, ["rope_scaling.rope_type", "yarn"]),
        ("llava", {"vocab_size": 319}, ["model.embed_tokens.weight", "(319, 32)", "(320, 32)"]),
        ("llava", {"mm_vision_tower": None}, ["mm_vision_tower"]),
        ("llava", {"mm_vision_select_layer": 26}, ["mm_vision_select_layer", "from -25 to 24"]),
        ("llava", {"mm_vision_select_layer": None}, ["mm_vision_select_layer"]),
        ("llava", {"mm_vision_select_feature": "cls"}, ["mm_vision_select_feature", "cls_patch"]),
        ("llava", {"mm_projector_type": "linear"}, ["mm_projector_type", "mlp2x_gelu", "'linear'"]),
        ("llava", {"mm_projector_type": ...}, ["mm_projector_type", "mlp2x_gelu", "no such key"]),
        ("llava", {"mm_projector_type": "mlp3x_gelu"}, ["mm_projector_type"]),
        ("llava", {"mm_hidden_size": 1024}, ["mm_hidden_size", "16"]),
        ("llava", {"mm_patch_merge_type": "spatial_unpad"}, ["mm_patch_merge_type", "'flat'"]),
        ("llava", {"image_aspect_ratio": "anyres_max_9"}, ["image_aspect_ratio", "anyres_max_9"]),
        ("llava", {"image_aspect_ratio": "highres"}, ["image_aspect_ratio"]),
        ("llava", {"mm_use_im_start_end": True}, ["mm_use_im_start_end", "False", "tokens around a picture"]),
        ("llava", {"mm_use_im_patch_token": True}, ["mm_use_im_patch_token"]),
        ("llava", {"mm_resampler_type": "perceiver"}, ["mm_resampler_type", "not supported"]),
        ("llava", {"mm_something_new": 1}, ["mm_something_new", "not supported"]),
        ("llava", {"s2": True}, ["s2", "scales"]),
        ("llava", {"quantization_config": {"load_in_4bit": True}}, ["quantization_config"]),
        ("llava", {"tie_word_embeddings": 1}, ["tie_word_embeddings"]),
        ("llava", {"torch_dtype": "float8"}, ["torch_dtype"]),
        ("llava", {"text_config": {}}, ["text_config", "already"]),
        ("llava", {"filtered_text_num": 3, "vis_token_granularity": [1, 16]}, ["image_aspect_ratio", "AVG-LLaVA"]),
        ("llava_next", {"mm_vision_select_feature": "cls_patch"}, ["mm_vision_select_feature", "tiles"]),
        ("llava_next", {"mm_patch_merge_type": "flat"}, ["mm_patch_merge_type", "'spatial_unpad'"]),
        ("llava_next", {"image_grid_pinpoints": "(1x1),...,(2x2)"}, ["image_grid_pinpoints", "as text is not supported"]),
        ("llava_next", {"image_grid_pinpoints": [[28, 30]]}, ["image_grid_pinpoints", "28"]),
        ("llava_next", {"image_grid_pinpoints": [[28, True]]}, ["image_grid_pinpoints"]),
        ("llava_next", {"image_grid_pinpoints": [["28", 28]]}, ["image_grid_pinpoints"]),
        ("llava_next", {"image_grid_pinpoints": [[2**40, 28]]}, ["image_grid_pinpoints"]),
        ("llava_next", {"image_grid_pinpoints": []}, ["image_grid_pinpoints"]),
        ("avg", {"vis_token_granularity": None}, ["router_select", "vis_token_granularity"]),
        ("avg", {"vis_token_granularity": None, "router_select": False}, ["vis_token_granularity", "model.router."]),
        ("avg", {"router_select": 1}, ["router_select"]),
        ("avg", {"vis_token_granularity": [16, 8, 4, 2, 1]}, ["vis_token_granularity", "coarse to fine"]),
        ("avg", {"vis_token_granularity": [1, 2, 4, 8, 15]}, ["vis_token_granularity", "1, 2, 4, 8, 16"]),
        ("avg", {"vis_token_granularity": [1, 2, 4, 16]}, ["model.router.voter", "(29, 1)", "(37, 1)"]),
        ("avg", {"filtered_text_num": 7}, ["model.router.voter", "(38, 1)", "(37, 1)"]),
        ("avg", {"filtered_text_num": ...}, ["model.router.voter", "(63, 1)", "(37, 1)"]),
        ("avg", {"filtered_text_num": "6"}, ["filtered_text_num", "'6'"]),
        ("avg", {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}, ["image_aspect_ratio", "AVG-LLaVA"]),
        ("stf", {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}, ["image_grid_pinpoints"]),
        ("stf", {"mm_vision_select_feature": "cls_patch"}, ["mm_vision_select_feature", "LLaVA-STF"]),
        ("stf", {"mm_vision_select_layer": -5}, ["mm_projector_crosslayer.0.weight", "(64, 112)", "(64, 128)", "20, 18"]),
    ],
)  # fmt: skip
def test_every_key_is_read(make: Any, tmp_path: Path, kind: str, changes: dict[str, Any], parts: list[str]) -> None:
    original = make(kind)
    for key, value in changes.items():
        original.config[key] = value
        if value is ...:
            del original.config[key]
    refused(original, tmp_path, *parts)


def test_stf_in_tiles(make: Any, tmp_path: Path) -> None:
    original = make("stf")
    original.config |= {
        key: originals.config_of("llava_next")[key] for key in ("image_aspect_ratio", "image_grid_pinpoints")
    }
    original.config["mm_patch_merge_type"] = "spatial_unpad"
    refused(original, tmp_path, "image_aspect_ratio", "LLaVA-STF")


def test_no_vision_tower(make: Any, tmp_path: Path) -> None:
    original = make("llava")
    original.config |= {"mm_vision_tower": "google/siglip"}
    refused(original, tmp_path / "a", "mm_vision_tower", "--vision-tower", "google/siglip", tower=False)
    original.config |= {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 1024}
    source = original.write(tmp_path / "b" / "original", tower=False)
    with pytest.raises(minifocus.CheckpointError, match=r"no vision tower .*expected --vision-tower .*clip-vit-large"):
        convert(source, tmp_path / "b" / "new")


@pytest.mark.parametrize("whole", [True, False])
def test_a_vision_tower_that_does_not_fit(make: Any, tmp_path: Path, whole: bool) -> None:
    original = make("llava")
    source = original.write(tmp_path / "original", tower=False)

    def wrong(*parts: str) -> None:
        with pytest.raises(minifocus.CheckpointError) as error:
            convert(source, tmp_path / "new", tmp_path / "clip")
        assert all(part in str(error.value) for part in (str(tmp_path / "clip"), *parts)), error.value
        assert not (tmp_path / "new").exists()

    wrong("found nothing")
    tower = original.write_tower(tmp_path / "clip", whole=whole)
    config = json.loads((tower / "config.json").read_text())
    tensors = load_file(tower / "model.safetensors")
    del tensors["vision_model.pre_layrnorm.bias"]
    originals.write_weights({**tensors, "vision_model.more": torch.ones(1)}, tower, "safetensors")
    wrong(f"missing: {TOWER}pre_layrnorm.bias", "unexpected: vision_model.more")
    (config["vision_config"] if whole else config)["num_hidden_layers"] = 10**7
    (tower / "config.json").write_text(json.dumps(config))
    wrong("10000000 layers", str(BLOCKS))
    (tower / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model"}))
    wrong("config.json: model_type", "clip")
    original.write_tower(tmp_path / "clip", whole=whole)
    (tower / "preprocessor_config.json").write_text(json.dumps({"size": 28, "crop_size": 28, "do_resize": False}))
    wrong("preprocessor_config.json: do_resize")


def test_files_that_are_none(make: Any, tmp_path: Path) -> None:
    original = make("llava")
    for name, content, words in (
        ("pytorch_model.bin", b"", "torch.save"),
        ("pytorch_model.bin", b"\x80\x04K\x01.", "torch.save"),
        ("pytorch_model.bin.index.json", b"{}", "weight_map"),
        ("pytorch_model.bin.index.json", b'{"weight_map": {"a": "../x.bin"}}', "weight_map"),
        ("pytorch_model.bin.index.json", b'{"weight_map": {"a": "x.bin"}}', "x.bin"),
        ("model.safetensors", b"x", "model.safetensors: not readable"),
        ("mm_projector.bin", b"", "mm_projector.bin: a part of a model alone"),
        ("config.json", b"{", "JSON"),
    ):
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        source = original.write(place / "original")
        (source / "model.safetensors").unlink()
        (source / name).write_bytes(content)
        with pytest.raises(minifocus.CheckpointError, match=words):
            convert(source, place / "new", original.write_tower(place / "clip", values=False))
        assert not (place / "new").exists()


def test_a_pickle_runs_nothing(make: Any, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "touched",))

    source = make("llava").write(tmp_path / "original", "bin")
    torch.save({"a": Evil()}, source / "pytorch_model.bin")
    with pytest.raises(minifocus.CheckpointError, match="not readable as tensors"):
        convert(source, tmp_path / "new", make("llava").write_tower(tmp_path / "clip", values=False))
    torch.save({"a": [torch.ones(1)]}, source / "pytorch_model.bin")
    with pytest.raises(minifocus.CheckpointError, match="expected names with dense tensors"):
        convert(source, tmp_path / "new", tmp_path / "clip")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "lm_head.weight", "model.router.voter", f"{TOWER}pre_layrnorm.bias"]
)
def test_values_that_are_none(make: Any, tmp_path: Path, name: str) -> None:
    original = make("avg")
    original.tensors[name].view(-1)[3] = torch.nan
    refused(original, tmp_path, "holds NaN or infinite values")
    if "router" not in name:  # whose reader has no such choice
        converted(original, tmp_path / "unchecked", check_finite=False)


def test_whole_numbers_are_no_weights(make: Any, tmp_path: Path) -> None:
    for layout in ("safetensors", "bin"):
        original = make("avg")
        original.tensors["model.router.voter"] = original.tensors["model.router.voter"].to(torch.int8)
        refused(original, tmp_path / layout, "not of dtype", "model.router.voter", layout=layout)


def test_tokenizers_that_cannot_be_read(make: Any, tmp_path: Path) -> None:
    original = make("llava")
    original.files["tokenizer.model"] = b"x"
    refused(original, tmp_path / "a", "tokenizer.model")
    del original.files["tokenizer.model"]
    refused(original, tmp_path / "b", "tokenizer.json or tokenizer.model")
    vocabulary = {
        "<s>": 0,
        "</s>": 1,
        "<unk>": 2,
        "a": 3,
        "b": 10,
        "c": 9,
        "d": 8,
    }  # 7, the library's next number, is of a hole
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    original.files["tokenizer.json"] = json.dumps({"version": "1.0", "added_tokens": [], "model": model}).encode()
    refused(original, tmp_path / "c", "<image> can be added as token 11")


def test_what_was_there_stays(make: Any, tmp_path: Path) -> None:
    """A failure leaves the model that was there; a success replaces it, and nothing else in the folder."""
    folder = converted(make("avg"), tmp_path)
    (folder / "notes.txt").write_text("mine")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    bad = make("llava")
    bad.tensors["model.norm.weight"][:] = torch.inf
    with pytest.raises(minifocus.CheckpointError, match="infinite"):
        convert(bad.write(tmp_path / "bad"), folder, tmp_path / "clip")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    for place, words in ((tmp_path / "original", "original"), (tmp_path / "clip", "clip")):
        with pytest.raises(minifocus.InputError, match=f"{words}, whose files the new ones would replace"):
            convert(tmp_path / "original", place, tmp_path / "clip")
    with pytest.raises(minifocus.InputError, match="expected a folder that can be written, found a file"):
        convert(tmp_path / "original", folder / "notes.txt", tmp_path / "clip")
    convert(make("stf").write(tmp_path / "stf"), folder, tmp_path / "clip")
    assert (folder / "notes.txt").read_text() == "mine" and minifocus.load(folder, "none").config.grid.cells == 4


# --------------------------------------------------------------------------------------------------------- command line


def test_loading_names_the_command(make: Any, tmp_path: Path) -> None:
    for kind in KINDS:
        source = make(kind).write(tmp_path / kind)
        with pytest.raises(minifocus.CheckpointError, match=r"python examples/convert\.py .* --out FOLDER"):
            minifocus.load(source)


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    program = example("convert")
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, words)])
    try:
        return int(program.main())
    except SystemExit as leaving:
        return int(leaving.code or 0)


def test_the_command(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make("stf").write(tmp_path / "original", tower=False)
    clip, new = make("stf").write_tower(tmp_path / "clip"), tmp_path / "new"
    assert run(monkeypatch, source, "--out", new, "--vision-tower", clip, "--template", "vicuna_v1") == 0
    assert capsys.readouterr().out == f"{new}: LLaVA-STF, asked in the template vicuna_v1\n"
    assert (
        minifocus.load(new, "none").generate(Image.new("RGB", (9, 7)), "what?", max_new_tokens=2).tokens.after_text == 4
    )
    for words, said in (
        ([source, "--out", source, "--vision-tower", clip], "whose files"),
        ([source, "--out", tmp_path / "other", "--vision-tower", tmp_path / "nowhere"], "found nothing"),
        ([new, "--out", tmp_path / "other"], "already"),
        ([source, "--out", tmp_path / "other", "--template", "plain"], "--template: invalid choice"),
        ([source], "--out"),
        (["a" * 5000, "--out", tmp_path / "other"], "name that cannot be used"),
        (["", "--out", tmp_path / "other"], "expected a path"),
    ):
        assert run(monkeypatch, *words) == 2
        printed = capsys.readouterr()
        assert not printed.out and printed.err.startswith("error: ") and printed.err.count("\n") == 1
        assert said in printed.err and len(printed.err) < 700, printed.err
        assert not (tmp_path / "other").exists()
