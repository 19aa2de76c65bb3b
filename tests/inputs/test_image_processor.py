"""Tiles against those of transformers' Pillow processors, and every key of a processor's file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import FIVE, HUB, ONE, SIX, picture, pinpoints_of, processor
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.processing_utils import ImagesKwargs

import minifocus
from minifocus import cards
from minifocus.errors import CheckpointError, InputError
from minifocus.inputs import image_processor
from minifocus.inputs.anyres import select_best_resolution
from minifocus.inputs.conversations import Conversation
from minifocus.inputs.image_processor import ImageProcessor
from minifocus.training.examples import encode
from minifocus.training.objective import Objective


def oracle_pixels(oracle, image):
    pixels = np.array(oracle([image], return_tensors="np")["pixel_values"][0])
    return torch.from_numpy(pixels if pixels.ndim == 4 else pixels[None])


# ------------------------------------------------------------------------------------------------------------- pixels

SIZES = [(1, 1), (1, 10000), (10000, 1), (2, 3), (37, 101), (101, 37), (64, 64), (333, 500), (65, 63), (28, 400)]
NEXT_FIELDS = {
    "hub": {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}},
    "sizes as numbers": {"size": 28, "crop_size": 28, "resample": 2},
    "squash size": {"size": {"height": 28, "width": 28}, "crop_size": [28, 28], "do_center_crop": False, "resample": 1},
    "other numbers": {
        "size": 28,
        "crop_size": 28,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": 0.7,
        "rescale_factor": 0.01,
        "do_pad": False,
    },
}


@pytest.mark.parametrize("fields", NEXT_FIELDS.values(), ids=NEXT_FIELDS)
@pytest.mark.parametrize("grids", [ONE, FIVE, SIX], ids=["1 pinpoint", "5 pinpoints", "6 pinpoints"])
def test_next_pixels_equal_transformers(tmp_path, fields, grids):
    fields = {**fields, "image_grid_pinpoints": pinpoints_of(28, grids)}
    ours, oracle = processor(tmp_path, fields, "llava_next", 28, grids), LlavaNextImageProcessorPil(**fields)
    for height, width in SIZES:
        image = picture(height, width)
        pixels, size = ours(image)
        assert size == (height, width)
        assert pixels.dtype == torch.float32 and pixels.is_contiguous()
        assert torch.equal(pixels, oracle_pixels(oracle, image)), (height, width)


CROP_FIELDS = {
    "hub": {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}},
    "larger than the crop": {"size": 41, "crop_size": 28, "resample": 2},
    "smaller than the crop": {"size": 15, "crop_size": 28, "image_mean": 0.2, "image_std": [0.3, 0.4, 0.5]},
    "squashed, cropped": {"size": {"height": 45, "width": 31}, "crop_size": 28},
    "squashed, not cropped": {"size": [28, 28], "do_center_crop": False, "resample": 0},
    "lanczos": {"size": 30, "crop_size": 28, "resample": 1, "rescale_factor": 1 / 127.5},
}


@pytest.mark.parametrize("fields", CROP_FIELDS.values(), ids=CROP_FIELDS)
@pytest.mark.parametrize("oracle_class", [CLIPImageProcessorPil, LlavaImageProcessorPil])
def test_crop_pixels_equal_transformers(tmp_path, fields, oracle_class):
    fields = {**fields, "image_processor_type": oracle_class.__name__}
    ours, oracle = processor(tmp_path, fields, "llava", 28), oracle_class(**fields)
    for height, width in [size for size in SIZES if max(size) < 1000] + [(7, 300), (300, 7)]:
        image = picture(height, width)
        pixels, size = ours(image)
        assert size == (height, width)
        assert pixels.shape == (1, 3, 28, 28)
        assert torch.equal(pixels, oracle_pixels(oracle, image)), (height, width)


@pytest.mark.parametrize("fields", CROP_FIELDS.values(), ids=CROP_FIELDS)
def test_padded_pixels_equal_transformers(tmp_path, fields):
    """On a square of the mean colour, as LLaVA-1.5 was trained."""
    fields = {**fields, "image_processor_type": "LlavaImageProcessor", "do_pad": True}
    if "image_mean" in fields:
        fields["image_mean"] = [0.2, 0.3, 0.4]  # transformers cannot pad with one number
    ours, oracle = processor(tmp_path, fields, "llava", 28), LlavaImageProcessorPil(**fields)
    for height, width in [(28, 28), (29, 28), (37, 61), (61, 37), (7, 300), (300, 7), (1, 1)]:
        image = picture(height, width)
        pixels, size = ours(image)
        assert size == (height, width) and torch.equal(pixels, oracle_pixels(oracle, image)), (height, width)


def test_padding_a_sliver_takes_little_memory(monkeypatch):
    """The square would have more pixels than a picture may: the sliver is shortened first, which changes little."""
    image, pad = picture(6, 500), ImageProcessor(False, 28, 28, mean=(0.0,) * 3, std=(1.0,) * 3, pad=True)
    plain, _ = pad(image)
    sizes, new = [], Image.new
    monkeypatch.setattr(image_processor, "MAX_PIXELS", 250 * 250)
    monkeypatch.setattr(Image, "new", lambda mode, size, *rest: sizes.append(size) or new(mode, size, *rest))
    bounded, size = pad(image)
    assert (250, 250) in sizes and size == (6, 500)
    assert plain.shape == bounded.shape and (plain - bounded).abs().mean() < 0.02


def test_what_a_model_sees_of_a_padded_picture():
    """All of it, and what is around it."""
    pad = ImageProcessor(False, 28, 28, pad=True)
    assert pad.seen((56, 28)) == (-14, 0, 42, 56) and pad.seen((20, 40)) == (0, -10, 40, 30)


def test_full_size_pixels_equal_transformers(tmp_path):
    """No processor file: the model's own tile size and transformers' other defaults."""
    image, size = picture(333, 501), {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    for model_type, oracle in (("llava_next", LlavaNextImageProcessorPil), ("llava", CLIPImageProcessorPil)):
        ours = ImageProcessor.from_folder(tmp_path, model_type=model_type, image_size=336, grid_pinpoints=HUB)
        assert torch.equal(ours(image)[0], oracle_pixels(oracle(**size), image))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 160), st.integers(1, 160), st.sampled_from([8, 14, 15]), st.sampled_from([ONE, FIVE, SIX]))
def test_any_size(height, width, tile, grids):
    image, grid = picture(height, width, seed=height), pinpoints_of(tile, grids)
    fields = {"size": {"shortest_edge": tile}, "crop_size": {"height": tile, "width": tile}}
    ours = ImageProcessor(True, tile, tile, grid_pinpoints=tuple(map(tuple, grid)))
    oracle = LlavaNextImageProcessorPil(**fields, image_grid_pinpoints=grid)
    assert torch.equal(ours(image)[0], oracle_pixels(oracle, image))
    crop = ImageProcessor(False, tile, tile)
    assert torch.equal(crop(image)[0], oracle_pixels(CLIPImageProcessorPil(**fields), image))


@pytest.mark.parametrize("height, width", [(2, 700), (700, 2), (7, 1000), (1000, 7), (90, 141), (141, 90)])
@pytest.mark.parametrize("edge", [20, 28, 33])
def test_cropping_before_resizing_changes_nothing_one_can_see(monkeypatch, height, width, edge):
    image, crop = picture(height, width), ImageProcessor(False, 28, edge, mean=(0.0,) * 3, std=(1.0,) * 3)
    plain, _ = crop(image)
    monkeypatch.setattr(image_processor, "MAX_PIXELS", 100)
    bounded, _ = crop(image)
    assert (plain - bounded).abs().max() * 255 <= 1.001
    assert (plain != bounded).float().mean() < 0.02  # Pillow holds the box in float32


def test_sliver_resized_in_the_other_order(monkeypatch):
    tiles = ImageProcessor(True, 28, 28, (0.0,) * 3, (1.0,) * 3, grid_pinpoints=((28, 56), (56, 28)))
    image, sizes, resize = picture(3000, 3), [], Image.Image.resize
    plain, _ = tiles(image)
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *rest: sizes.append(size) or resize(self, size, *rest)
    )
    monkeypatch.setattr(image_processor, "MAX_PIXELS", 3000 * 28 - 1)
    bounded, _ = tiles(image)
    assert sizes[:2] == [(3, 28), (28, 28)]
    assert plain.shape == bounded.shape
    assert (plain - bounded).abs().max() * 255 <= 2.001


def test_what_a_model_sees_of_a_picture():
    """The rest may be anything: the pixels stay the same."""
    assert ImageProcessor(True, 28, 28, grid_pinpoints=((28, 56),)).seen((90, 40)) == (0, 0, 40, 90)
    assert ImageProcessor(False, 28, 28).seen((28, 90)) == (31, 0, 59, 28)
    assert ImageProcessor(False, 28, (28, 28)).seen((40, 90)) == (0, 0, 90, 40)  # squashed, not cropped
    assert ImageProcessor(False, 28, 14).seen((40, 40)) == (-20, -20, 60, 60)
    crop = ImageProcessor(False, 28, 41, resample=Image.Resampling.NEAREST)
    for height, width in SIZES[3:]:
        left, top, right, bottom = crop.seen((height, width))
        shown, other = picture(height, width).crop((left, top, right, bottom)), picture(height, width, seed=1)
        other.paste(shown, (left, top))
        assert torch.equal(crop(other)[0], crop(picture(height, width))[0]), (height, width)


def test_only_rgb_goes_in():
    with pytest.raises(InputError, match="RGB.*open_image.*got mode L"):
        ImageProcessor(False, 28, 28)(Image.new("L", (5, 5)))


# ---------------------------------------------------------------------------------------------------- processor files


def test_newer_file_wins_when_nested(tmp_path):
    nested = {"image_processor": {"size": 28, "crop_size": 28, "image_mean": [0.1, 0.2, 0.3]}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    older = processor(tmp_path, {"size": 28, "crop_size": 28}, "llava", 28)
    assert older.mean == (0.1, 0.2, 0.3)
    (tmp_path / "processor_config.json").write_text(json.dumps({"patch_size": 14}))
    assert processor(tmp_path, {"size": 28, "crop_size": 28, "image_mean": 0.4}, "llava", 28).mean == (0.4,) * 3


def test_null_inside_a_size_is_no_edge(tmp_path):
    """As fast processors of transformers 4 wrote it."""
    fields = {"size": {"shortest_edge": 28, "height": None}, "crop_size": 28, "do_pad": None}
    assert processor(tmp_path, fields, "llava", 28) == ImageProcessor(False, 28, 28)


# The keys of transformers' processors, and what each is set to, beside WRONG_FIELDS.
FIELDS = {
    "do_convert_rgb": [False],
    "do_resize": [],
    "size": [
        30, {"height": 30, "width": 30}, {"height": 28, "width": 40}, {"max_height": 28, "max_width": 28},
        {"shortest_edge": 28.0},
    ],
    "size_divisor": [4],
    "default_to_square": [True, False],
    "crop_size": [30, {"height": 30, "width": 30}],
    "do_center_crop": [],
    "resample": [0, 2, 3, 6, 2.0, "BICUBIC"],
    "do_rescale": [],
    "rescale_factor": [0.01, 1, "0.1"],
    "do_normalize": [],
    "image_mean": [0.5, [0.5, 0.4, 0.3], [0.5]],
    "image_std": [0.5, [0.5, 0.4, 0.3], [0.5]],
    "do_pad": [],
    "pad_size": [{"height": 56, "width": 56}],
    "image_grid_pinpoints": [pinpoints_of(28, ONE), pinpoints_of(28, FIVE)],
    "use_square_size": [],
    "data_format": ["channels_first"],
    "input_data_format": ["channels_last"],
    "device": ["cpu"],
    "return_tensors": ["np"],
    "disable_grouping": [True],
    "image_seq_length": [5],
    "no_such_key": [5],
}  # fmt: skip
WRONG_FIELDS = [None, True, False, 0, -1, "word", [], {}, float("nan"), 10**400]
UNREAD = {"no_such_key", "do_convert_rgb", "default_to_square", "pad_size", "size_divisor", "image_seq_length"}
ARGUMENTS = {"data_format", "input_data_format", "device", "return_tensors", "disable_grouping"}  # of a call


@pytest.mark.parametrize("oracle_class", [CLIPImageProcessorPil, LlavaImageProcessorPil, LlavaNextImageProcessorPil])
def test_every_key_of_transformers(tmp_path, oracle_class):
    """With each key, pixels equal those of transformers, or the folder is refused, whatever the key holds."""
    model_type = "llava_next" if oracle_class is LlavaNextImageProcessorPil else "llava"
    assert set(oracle_class.valid_kwargs.__annotations__) | set(ImagesKwargs.__annotations__) <= set(FIELDS)
    image, base = picture(37, 61), {**GOOD, "image_processor_type": oracle_class.__name__}
    if model_type == "llava_next":
        base["image_grid_pinpoints"] = pinpoints_of(28, FIVE)
    followed = set()
    for key, values in FIELDS.items():
        for value in [*values, *(WRONG_FIELDS if key not in ARGUMENTS else ())]:
            fields = {**base, key: value}
            try:
                got = processor(tmp_path, fields, model_type, 28)(image)[0]
            except CheckpointError as error:
                assert f"{key}: expected" in str(error), (fields, error)
                continue
            followed.add(key)
            if key in UNREAD and value in WRONG_FIELDS:  # transformers minds some of these
                fields = base
            assert torch.equal(got, oracle_pixels(oracle_class(**fields), image)), fields
    assert {"resample", "rescale_factor", "image_mean", "image_std", "do_resize"} <= followed
    if model_type == "llava_next":
        del base["image_grid_pinpoints"]  # transformers' own are those of tiles of 336 pixels
        with pytest.raises(CheckpointError, match="image_grid_pinpoints: expected config.json's .* got no such key"):
            processor(tmp_path, base, model_type, 28)


GOOD = {"size": 28, "crop_size": 28}
REFUSED = [
    ("llava", {"do_resize": False}, "do_resize"),
    ("llava_next", {"do_rescale": False}, "do_rescale"),
    ("llava", {"do_normalize": False}, "do_normalize"),
    ("llava", {"do_pad": True}, "do_pad"),
    ("llava", {"use_square_size": True}, "use_square_size"),
    ("llava", {"do_center_crop": False}, "do_center_crop"),
    ("llava", {"image_processor_type": "LlavaNextImageProcessor"}, "image_processor_type"),
    ("llava_next", {"image_processor_type": "CLIPImageProcessor"}, "image_processor_type"),
    ("llava_next", {"size": 56}, "size"),
    ("llava", {"size": {"longest_edge": 28}}, "size"),
    ("llava", {"size": {"shortest_edge": 28, "longest_edge": 56}}, "size"),
    ("llava", {"size": "28"}, "size"),
    ("llava", {"size": 0}, "size"),
    ("llava", {"size": 10**9}, "size"),
    ("llava", {"size": True}, "size"),
    ("llava", {"crop_size": 56}, "crop_size"),
    ("llava_next", {"crop_size": {"height": 28, "width": 56}}, "crop_size"),
    ("llava", {"resample": 6}, "resample"),
    ("llava", {"resample": "bicubic"}, "resample"),
    ("llava", {"image_mean": [0.5, 0.5]}, "image_mean"),
    ("llava", {"image_mean": "CLIP"}, "image_mean"),
    ("llava", {"image_std": [0.5, 0, 0.5]}, "image_std"),
    ("llava", {"rescale_factor": float("nan")}, "rescale_factor"),
    ("llava", {"rescale_factor": [1, 2, 3]}, "rescale_factor"),
    ("llava_next", {"image_grid_pinpoints": pinpoints_of(28, ONE)}, "image_grid_pinpoints"),
]


@pytest.mark.parametrize("model_type, fields, key", REFUSED)
def test_unsupported_processor_is_refused(tmp_path, model_type, fields, key):
    with pytest.raises(CheckpointError) as error:
        processor(tmp_path, {**GOOD, **fields}, model_type, 28)
    assert f"{tmp_path / 'preprocessor_config.json'}: {key}: expected" in str(error.value)


def test_tile_size_of_a_file_that_says_nothing(tmp_path):
    """transformers takes 224 then, which a 336-pixel vision tower cannot."""
    with pytest.raises(CheckpointError, match="crop_size: expected 336.*got no such key"):
        processor(tmp_path, {}, "llava", 336)
    assert processor(tmp_path, {}, "llava", 224) == ImageProcessor(False, 224, 224)


@pytest.mark.parametrize("text", ["{", "[1]", '{"image_processor": 3}'])
def test_damaged_processor_file(tmp_path, text):
    (tmp_path / "processor_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"processor_config\.json"):
        ImageProcessor.from_folder(tmp_path, model_type="llava", image_size=28)


def test_no_message_repeats_its_input_at_length(tmp_path):
    """Elsewhere than in a picture's name: the same words of a processor's file and of a caller's arguments."""
    long = "long " * 20_000
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": long}))
    (tmp_path / "own").mkdir()
    conversation = Conversation(long, (Image.new("RGB", (0, 1)),), ())
    tiny = minifocus.load(Path(__file__).resolve().parents[2] / "weights/tiny", "none")
    for call in (
        lambda: processor(tmp_path, GOOD, "llava", 28),
        lambda: processor(tmp_path / "own", {**GOOD, "resample": long}, "llava", 28),
        lambda: processor(tmp_path / "own", {**GOOD, "image_grid_pinpoints": [[1, 2]] * 9999}, "llava_next", 28),
        lambda: select_best_resolution((0, 5), [(28, 28)] * 9999),
        lambda: cards.scenes(long),
        lambda: cards.scenes("test", 10**5000),
        lambda: Objective(scale_weights=(-1.0,) * 9999),
        lambda: encode(tiny.processor, conversation),
    ):
        with pytest.raises((CheckpointError, InputError)) as error:
            call()
        assert len(str(error.value)) < 500
