"""Pixels, token counts and feature packing against transformers' Pillow processors, and every kind of bad picture."""

import base64
import io
import json
import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers.image_processing_utils import select_best_resolution as oracle_best_resolution
from transformers.image_transforms import convert_to_rgb
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, unpad_image
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.processing_utils import ImagesKwargs

import minifocus.inputs.image
from minifocus import cards
from minifocus.errors import CheckpointError, InputError
from minifocus.inputs.conversations import Conversation
from minifocus.inputs.image import (
    _AS_CONTENT,
    ImageProcessor,
    num_visual_tokens,
    open_image,
    select_best_resolution,
    stitch,
    unpadded_grid,
)
from minifocus.training.examples import encode
from minifocus.training.objective import Objective

ONE = [[2, 2]]
FIVE = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
SIX = [[3, 3], *FIVE]  # the largest first: small pictures must not take it
HUB = [[336 * rows, 336 * cols] for rows, cols in FIVE]


def pinpoints_of(tile, grids=FIVE):
    return [[tile * rows, tile * cols] for rows, cols in grids]


def picture(height, width, seed=0):
    """Noise on a gradient: every pixel differs, as bit-for-bit comparison needs, and edges are not all alike."""
    noise = np.random.default_rng(seed).integers(0, 128, (height, width, 3))
    ramp = np.linspace(0, 127, width)[None, :, None]
    return Image.fromarray((noise + ramp).astype(np.uint8))


def processor(tmp_path, fields, model_type, tile, grids=FIVE):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    return ImageProcessor.from_folder(
        tmp_path, model_type=model_type, image_size=tile, grid_pinpoints=pinpoints_of(tile, grids)
    )


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
    monkeypatch.setattr(minifocus.inputs.image, "MAX_PIXELS", 100)
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
    monkeypatch.setattr(minifocus.inputs.image, "MAX_PIXELS", 3000 * 28 - 1)
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


# ------------------------------------------------------------------------------------------------------ picture modes


def modes():
    """Pictures of every mode that transformers' own conversion handles."""
    rgb = picture(20, 30)
    alpha = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 30), dtype=np.uint8))
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    yield "rgb", rgb
    yield "rgba", rgba
    for mode in ("1", "L", "P", "CMYK", "YCbCr", "HSV"):
        yield mode, rgb.convert(mode)
    yield "LA", rgba.convert("LA")
    yield "PA", rgba.convert("PA")
    palette = rgb.convert("P")
    palette.info["transparency"] = 7
    yield "palette, one transparent colour", palette
    palette = rgb.convert("P")
    palette.info["transparency"] = bytes(range(256))
    yield "palette, alpha of each colour", palette
    keyed = rgb.copy()
    keyed.putpixel((3, 4), (1, 2, 3))
    keyed.info["transparency"] = (1, 2, 3)
    yield "rgb, one transparent colour", keyed


@pytest.mark.parametrize("image", [pytest.param(image, id=name) for name, image in modes()])
def test_modes_equal_transformers(image):
    before = image.copy()
    opened = open_image(image)
    assert opened.mode == "RGB"
    assert np.array_equal(np.asarray(opened), convert_to_rgb(image, return_numpy=True))
    assert image.mode == before.mode and image.tobytes() == before.tobytes()


FORMATS = "png P, png RGBA, png 1, tiff CMYK, jpg CMYK, webp RGBA, bmp RGB, ppm RGB, tga RGBA, gif P, jp2 RGB"


@pytest.mark.parametrize("suffix, mode", [pair.split() for pair in FORMATS.split(", ")])
def test_formats(tmp_path, suffix, mode):
    path = tmp_path / f"x.{suffix}"
    picture(20, 30).convert(mode).save(path)
    with Image.open(path) as image:
        expected = convert_to_rgb(image, return_numpy=True)
    for source in (path, str(path), os.fsencode(path)):
        assert np.array_equal(np.asarray(open_image(source)), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_exif_orientation_is_applied_once(tmp_path, suffix, orientation):
    path, exif = tmp_path / f"x.{suffix}", Image.Exif()
    exif[0x0112] = orientation
    picture(20, 30).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert expected.shape[:2] == ((20, 30) if orientation < 5 else (30, 20))
    opened = open_image(path)
    assert np.array_equal(np.asarray(opened), expected)
    assert np.array_equal(np.asarray(open_image(opened)), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_damaged_exif_is_ignored(tmp_path):
    path = tmp_path / "x.jpg"
    picture(20, 30).save(path, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert open_image(path).size == (30, 20)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_first_frame(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    first, second = Image.new("RGB", (9, 5), "red"), Image.new("RGB", (9, 5), "blue")
    first.save(path, save_all=True, append_images=[second], lossless=True)
    assert open_image(path).getpixel((4, 2)) == (255, 0, 0)


def test_deep_pictures_are_rescaled_not_clipped(tmp_path):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    levels = [0, 0, 1, 1, 128, 255]
    Image.fromarray(values).save(tmp_path / "16.png")
    Image.fromarray(values.astype(">u2")).save(tmp_path / "16.tiff")
    (tmp_path / "16.pgm").write_bytes(b"P5 6 1 65535\n" + values.astype(">u2").tobytes())
    for name in ("16.png", "16.tiff", "16.pgm"):
        opened = open_image(tmp_path / name)
        assert opened.mode == "RGB"
        assert np.asarray(opened)[0, :, 0].tolist() == levels, name


@pytest.mark.parametrize("values, levels", [
    (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),  # fractions
    (np.array([[0.0, 1.5, 255.0]], np.float32), [0, 2, 255]),  # what Pillow itself calls F
    (np.array([[-1.0, 0.0, 3.0]], np.float32), [0, 64, 255]),  # no known white: its own range
    (np.array([[7.0, 7.0]], np.float32), [7, 7]),
    (np.array([[700.0, 700.0]], np.float32), [0, 0]),
    (np.array([[0, 50000, 65535]], np.int32), [0, 195, 255]),
    (np.array([[0, 100, 200]], np.int32), [0, 100, 200]),  # 8-bit grey in a wider type
    (np.array([[-(2**31), 0, 2**31 - 1]], np.int32), [0, 128, 255]),
])  # fmt: skip
def test_grey_of_floats_and_integers(values, levels):
    assert np.asarray(open_image(Image.fromarray(values)))[0, :, 1].tolist() == levels


def test_dark_files_of_16_bits_stay_dark(tmp_path):
    """Pillow reads a PPM of 16 bits as 32-bit integers; its white is 65535 whatever its values."""
    values = np.array([[0, 100, 200]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "16.png")
    (tmp_path / "16.pgm").write_bytes(b"P5 3 1 65535\n" + values.astype(">u2").tobytes())
    for name in ("16.png", "16.pgm"):
        assert np.asarray(open_image(tmp_path / name))[0, :, 0].tolist() == [0, 0, 1], name


def test_transparency_is_over_white_in_deep_and_premultiplied_pictures(tmp_path):
    values = np.array([[0, 257, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "16.png", transparency=257)
    assert np.asarray(open_image(tmp_path / "16.png"))[0, :, 0].tolist() == [0, 255, 255]
    for mode, colour in (("RGBA", (255, 0, 0, 51)), ("LA", (0, 51))):
        image = Image.new(mode, (2, 2), colour)
        assert open_image(image.convert(mode.replace("A", "a"))).getpixel((0, 0)) == open_image(image).getpixel((0, 0))


# ------------------------------------------------------------------------------------------------------- transparency

WHITE, RED, GREEN = (255, 255, 255), (255, 0, 0), (0, 255, 0)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bits, colour, *chunks):
    """A PNG of this size, bits a sample and colour type (0: grey, 2: RGB, 3: palette), of these chunks."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *chunks])


def row(image):
    return [image.getpixel((x, 0)) for x in range(image.width)]


def small_png(bits, colour, samples, clear, late=False):
    """One row of samples; of `clear`, its tRNS chunk, before the pixels or after them."""
    text = "".join(format(value, f"0{bits}b") for value in samples)
    data = int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")
    chunks = [chunk(b"tRNS", clear), chunk(b"IDAT", zlib.compress(b"\0" + data))]
    width = len(samples) // (3 if colour == 2 else 1)
    return png(width, 1, bits, colour, *(chunks[::-1] if late else chunks), chunk(b"IEND", b""))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_transparent_grey_of_a_png(tmp_path, bits):
    """libpng's rule: the key is compared with the samples as they are in the file, by as many bits as these have."""
    top = 2**bits - 1
    for key in {0, 1, top // 2, top}:
        values = [0, top, key, top // 3]
        expected = [WHITE if value == key else (round(value * 255 / top),) * 3 for value in values]
        content = small_png(bits, 0, values, struct.pack(">H", key))
        (tmp_path / "x.png").write_bytes(content)
        loaded = Image.open(io.BytesIO(content))
        loaded.load()
        for source in (tmp_path / "x.png", Image.open(io.BytesIO(content)), loaded, loaded.copy()):
            assert row(open_image(source)) == expected, (key, source)
        if 1 < bits < 16:  # what Pillow 13 makes of a 1-bit key has one bit left
            content = small_png(bits, 0, values, struct.pack(">H", 0xFF00 | key))
            assert row(open_image(Image.open(io.BytesIO(content)))) == expected, key
    late = small_png(bits, 0, [0, top], b"\0\0", late=True)
    assert row(open_image(Image.open(io.BytesIO(late)))) == [(0,) * 3, WHITE]


def test_the_transparent_colour_of_a_png():
    """Of 16 bits each, all of them: a colour that differs from it in the last one is another."""
    key = (0x1234, 0x5678, 0x9ABC)
    near = [(0x1235, *key[1:]), (*key[:2], 0x9ABD), (0x3434, 0x7878, 0xBCBC), (0x1134, *key[1:])]
    samples = [value for colour in (key, *near) for value in colour]
    content = small_png(16, 2, samples, struct.pack(">3H", *key))
    high = [tuple(value >> 8 for value in colour) for colour in near]
    assert row(open_image(Image.open(io.BytesIO(content)))) == [WHITE, *high]
    loaded = Image.open(io.BytesIO(content))
    loaded.load()  # from here on, nobody knows the low bytes
    assert row(open_image(loaded)) == [WHITE] * 3 + high[2:]
    content = small_png(8, 2, [1, 2, 3, 1, 2, 4], struct.pack(">3H", 0x101, 2, 3))
    assert row(open_image(Image.open(io.BytesIO(content)))) == [WHITE, (1, 2, 4)]


def palettes():
    """(name, picture of a clear red pixel and a green one)"""
    palette = Image.new("P", (2, 1))
    palette.putpixel((1, 0), 1)
    palette.putpalette([*RED, 0, *GREEN, 255], "RGBA")
    yield "an RGBA palette", palette
    clear = Image.new("RGBA", (2, 1), (*RED, 0))
    clear.putpixel((1, 0), (*GREEN, 255))
    yield "quantize", clear.quantize(2)
    opaque = Image.new("P", (2, 1))
    opaque.putpixel((1, 0), 1)
    opaque.putpalette([*RED, *GREEN])
    yield "PA", Image.merge("PA", (opaque, clear.getchannel("A")))
    for name, key in (("an entry", 0), ("alphas", b"\0"), ("more alphas than a palette has", b"\0" + b"\xff" * 300)):
        palette = Image.new("P", (2, 1))
        palette.putpixel((1, 0), 1)
        palette.putpalette([*RED, *GREEN])
        palette.info["transparency"] = key
        yield name, palette
    if int(PIL.__version__.split(".")[0]) >= 13:  # earlier ones cannot read it
        header = struct.pack("<BBBHHBHHHHBB", 0, 1, 1, 0, 2, 32, 0, 0, 2, 1, 8, 0x20)
        yield "a colour map of 32 bits", Image.open(io.BytesIO(header + bytes([0, 0, 255, 0, 0, 255, 0, 255, 0, 1])))


@pytest.mark.parametrize("image", [pytest.param(image, id=name) for name, image in palettes()])
@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
def test_transparency_in_a_palette(image):
    assert row(open_image(image)) == [WHITE, GREEN]
    assert row(image.convert("RGB")) == [RED, GREEN]  # the caller's own is as it was
    assert image.mode == "PA" or image.palette.mode.endswith("A") == ("transparency" not in image.info)


def test_what_is_beside_the_colours_of_a_palette_without_alpha():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 0, *GREEN, 0], "RGBX")
    assert row(open_image(image)) == [RED, RED]
    image.info["transparency"] = 1
    assert row(open_image(image)) == [RED, RED]


@pytest.mark.parametrize("clear", [None, 1])
def test_a_gif_is_transparent_around_its_first_frame(tmp_path, clear):
    """Palette red, green; a green pixel in the middle of three."""
    (tmp_path / "x.gif").write_bytes(
        b"GIF89a" + struct.pack("<HH", 3, 1) + b"\x80\0\0" + bytes([*RED, *GREEN])
        + (b"" if clear is None else b"!\xf9\x04\x01\0\0" + bytes([clear, 0]))
        + b"," + struct.pack("<HHHH", 1, 0, 1, 1) + b"\0" + b"\x02\x02\x4c\x01\0;"
    )  # fmt: skip
    expected = [WHITE, WHITE if clear else GREEN, WHITE]
    assert row(open_image(tmp_path / "x.gif")) == expected
    with Image.open(tmp_path / "x.gif") as image:
        assert row(open_image(image)) == expected


def test_greys_of_other_formats_are_no_shallow_png(tmp_path):
    """The palette of a GIF may be the greys themselves; a step of 2 bits in them is nobody's key."""
    greys = Image.new("L", (3, 1))
    greys.putdata([0, 85, 170])
    greys.save(tmp_path / "x.gif", transparency=1, optimize=False)
    for load in (False, True):
        with Image.open(tmp_path / "x.gif") as image:
            if load:
                image.load()
            assert row(open_image(image)) == [(0,) * 3, (85,) * 3, (170,) * 3]


@pytest.mark.parametrize(("mode", "keys"), [
    ("P", [-1, 256, 1.5, "0", (0, 0, 0), [0]]),
    ("RGB", [0, b"\0\0\0", (1, 2), (1, 2, 3, 4), (1, 2, "3"), "red", np.zeros(3)]),
    ("L", [b"\0", (0,), 0.5, "0", np.zeros(2)]),
    ("1", [b"\0", (0, 0, 0), "white"]),
    ("I;16", [b"\0", (0, 0, 0), 0.5]),
    ("F", [b"\0", "0"]),
])  # fmt: skip
def test_a_key_that_is_none_is_refused(mode, keys):
    image = Image.new(mode, (2, 1))
    for image.info["transparency"] in keys:
        with pytest.raises(
            InputError, match=rf"^the picture: info\['transparency'\] of a picture of mode {mode}: expected"
        ):
            open_image(image)
    for mode in ("CMYK", "YCbCr", "HSV", "RGBA", "LA"):  # Pillow's key is none of theirs; it stays when they are made
        image = Image.new("RGB", (2, 1), RED).convert(mode)
        before = row(open_image(image))
        image.info["transparency"] = 0
        assert row(open_image(image)) == before


# ------------------------------------------------------------------------------------------------------- bad pictures


def write_bomb(path, side=60_000):
    """All of the picture is there: 3.6 gigapixels of black, 1 bit each, in some 400 kB."""
    deflate, block, left = zlib.compressobj(), bytes(2**20), side * (1 + (side + 7) // 8)
    data = []
    while left:
        data.append(deflate.compress(block[:left]))
        left -= min(left, len(block))
    data.append(deflate.flush())
    path.write_bytes(png(side, side, 1, 0, chunk(b"IDAT", b"".join(data)), chunk(b"IEND", b"")))


def bad_files(folder):
    """(name, how its error must read) of every bad picture file, written into `folder`."""
    whole = io.BytesIO()
    picture(50, 60).save(whole, "PNG")
    (folder / "cut.png").write_bytes(whole.getvalue()[:-1000])
    (folder / "head.png").write_bytes(whole.getvalue()[:60])
    whole = io.BytesIO()
    picture(50, 60).save(whole, "JPEG")
    (folder / "cut.jpg").write_bytes(whole.getvalue()[:-500])
    (folder / "text.jpg").write_text("This is no picture.")
    (folder / "empty.png").write_bytes(b"")
    (folder / "script.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    picture(16, 16).save(folder / "icon.ico")  # holds a second picture, of a size of its own
    (folder / "zero.ppm").write_bytes(b"P6 0 5 255\n")
    Image.fromarray(np.array([[1.0, np.nan]], np.float32)).save(folder / "nan.tiff")
    (folder / "folder.png").mkdir()
    for name, sides in (("big.png", (10_000, 8_948)), ("huge.png", (60_000, 60_000))):
        (folder / name).write_bytes(png(*sides, 1, 0, chunk(b"IDAT", b"")))
    os.mkfifo(folder / "pipe.png")
    (folder / "away.png").symlink_to("nowhere")
    return {
        "cut.png": "not a picture that can be read",
        "head.png": "not a picture that can be read",
        "cut.jpg": "not a picture that can be read",
        "text.jpg": "not a picture that can be read",
        "empty.png": "not a picture that can be read",
        "script.eps": "not a picture that can be read",
        "zero.ppm": "",
        "nan.tiff": "NaN or infinite",
        "icon.ico": "not a picture that can be read: expected one of PNG, JPEG,",
        "folder.png": "expected a picture file, found a folder",
        "missing.png": "expected a picture file, found nothing",
        "pipe.png": "expected a picture file, found a FIFO",
        "nul\0.png": "found a name that cannot be used (embedded null byte); a file's content goes in as PIL.Image.open(",
        "away.png": "found a link that leads nowhere",
        "x" * 300 + ".png": "found a name that cannot be used (File name too long)",
        "big.png": "over the limit of 89478485",
        "huge.png": "over the limit of 89478485",
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_files_are_named(tmp_path):
    for name, words in bad_files(tmp_path).items():
        with pytest.raises(InputError) as error:
            open_image(tmp_path / name)
        assert str(tmp_path / name) in str(error.value), name
        assert words in str(error.value), name


def test_messages_do_not_repeat_the_picture(tmp_path):
    """Given as a data URL, as base64 or as bytes, a picture is a very long name, and perhaps a name that is none."""
    content = io.BytesIO()
    picture(300, 300).save(content, "PNG")
    coded = base64.b64encode(content.getvalue()).decode()
    for source, words in (
        (f"data:image/png;base64,{coded}", _AS_CONTENT),
        (coded, _AS_CONTENT),
        (coded[:900], _AS_CONTENT),  # as long as a path may be
        ("data:image/gif;base64,R0lGODlhAQABAAAAACw=", _AS_CONTENT),
        (content.getvalue(), _AS_CONTENT),
        (bytearray(content.getvalue()), f"got bytearray{_AS_CONTENT}"),
        (content, f"got BytesIO{_AS_CONTENT}"),
        ("https://example.org/a.png?" + "long" * 1000, "a picture is not fetched from a URL"),
        ("surrogate \ud800", "surrogate \\ud800: expected a picture file, found a name that cannot be used"),
        (b"\xff.png", "\\udcff.png: expected a picture file, found nothing"),
    ):
        with pytest.raises(InputError) as error:
            open_image(source)
        assert words in str(error.value) and len(str(error.value)) < 800
        str(error.value).encode()
    named = Image.new("RGB", (0, 5))
    for named.filename, words in ((coded, "iVBOR"), (5, "the picture: "), ("", "the picture: ")):
        with pytest.raises(InputError) as error:
            open_image(named)
        assert str(error.value).lstrip("'").startswith(words) and len(str(error.value)) < 800


def test_no_message_repeats_its_input_at_length(tmp_path):
    """Elsewhere than in a picture's name: the same words of a processor's file and of a caller's arguments."""
    long = "long " * 20_000
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": long}))
    (tmp_path / "own").mkdir()
    conversation = Conversation(long, (Image.new("RGB", (0, 1)),), ())
    for call in (
        lambda: processor(tmp_path, GOOD, "llava", 28),
        lambda: processor(tmp_path / "own", {**GOOD, "resample": long}, "llava", 28),
        lambda: processor(tmp_path / "own", {**GOOD, "image_grid_pinpoints": [[1, 2]] * 9999}, "llava_next", 28),
        lambda: select_best_resolution((0, 5), [(28, 28)] * 9999),
        lambda: cards.scenes(long),
        lambda: cards.scenes("test", 10**5000),
        lambda: Objective(scale_weights=(-1.0,) * 9999),
        lambda: encode(minifocus.load(Path(__file__).parents[1] / "weights/tiny", "none").processor, conversation),
    ):
        with pytest.raises((CheckpointError, InputError)) as error:
            call()
        assert len(str(error.value)) < 500


def test_bad_sources():
    with pytest.raises(InputError, match="got ndarray"):
        open_image(np.zeros((5, 5, 3), np.uint8))
    with pytest.raises(InputError, match="the picture: a picture without pixels"):
        open_image(Image.new("RGB", (0, 5)))
    with pytest.raises(InputError, match="the picture: 5x6 = 30 pixels.*limit of 29"):
        open_image(Image.new("RGB", (6, 5)), max_pixels=29)
    assert open_image(Image.new("RGB", (6, 5)), max_pixels=np.int64(30)).size == (6, 5)
    with pytest.raises(InputError, match="max_pixels: expected a 64-bit whole number of at least 1, got 0"):
        open_image(Image.new("RGB", (6, 5)), max_pixels=0)


def test_closed_file(tmp_path):
    picture(5, 6).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        pass
    with pytest.raises(InputError, match=r"x\.png: not a picture that can be read"):
        open_image(image)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are listed in /proc on Linux only")
def test_file_is_closed_again(tmp_path):
    picture(5, 6).save(tmp_path / "x.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "x.png").read_bytes()[:70])
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        open_image(tmp_path / "x.png")
        with pytest.raises(InputError):
            open_image(tmp_path / "cut.png")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


BOUNDED = """
import resource, sys
from pathlib import Path
from PIL import Image
from minifocus.errors import InputError
from minifocus.inputs.image import ImageProcessor, open_image

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

folder = Path(sys.argv[1])
Image.new("RGB", (9, 9)).save(folder / "warm.png")
open_image(folder / "warm.png")
before = peak()
for limit in (None, 10**10, Image.MAX_IMAGE_PIXELS):
    Image.MAX_IMAGE_PIXELS = limit
    try:
        open_image(folder / "bomb.png")
    except InputError as error:
        assert "bomb.png" in str(error) and "89478485" in str(error), error
    else:
        raise AssertionError("a picture of 3.6 gigapixels was opened")
    assert Image.MAX_IMAGE_PIXELS == limit
print(peak() - before)
grid = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
views = ImageProcessor(True, 336, 336, grid_pinpoints=grid), ImageProcessor(False, 336, 336)
for size in ((60000, 2), (2, 60000), (1, 5_000_000), (5_000_000, 1)):
    image = Image.linear_gradient("L").resize(size)
    image.save(folder / "sliver.png")
    for view in views:
        pixels, shape = view(open_image(folder / "sliver.png"))
        assert shape == (size[1], size[0]) and pixels.isfinite().all() and pixels.std() > 0
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts ru_maxrss in KiB, as Linux does")
def test_memory_is_bounded(tmp_path):
    """Decoded, the bomb takes 14 GB; resized before they are cropped, the slivers take 13 GB and more."""
    write_bomb(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 500_000
    command = [sys.executable, "-c", BOUNDED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(minifocus.inputs.image.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    bomb, slivers = map(int, done.stdout.split())
    assert bomb < 16  # MiB
    assert slivers < 400


# ----------------------------------------------------------------------------------------------- counting and packing

TABLE = [  # spec §4: (h, w), kept rows and columns, tokens
    ((336, 336), (24, 24), 1176),
    ((672, 672), (48, 48), 2928),
    ((480, 640), (36, 48), 2340),
    ((640, 480), (48, 36), 2352),
    ((899, 1024), (42, 48), 2634),
    ((1080, 1920), (28, 48), 1948),
    ((100, 1000), (8, 72), 1160),
    ((1000, 100), (72, 8), 1224),
    ((333, 500), (24, 36), 1464),
    ((1, 1), (24, 24), 1176),
    ((1, 10000), (0, 48), 576),
]


@pytest.mark.parametrize("size, kept, tokens", TABLE)
def test_tokens_of_the_table(size, kept, tokens):
    assert unpadded_grid(size, select_best_resolution(size, HUB), 336, 24)[2:] == kept
    assert num_visual_tokens(size, HUB, 336, 14) == tokens


def random_sizes(count):
    yield from ((47, 94), (94, 47), (55, 66), (55, 132), (132, 55), (998, 1497))  # 24 comes out as 23.999…
    rng = random.Random(0)
    for _ in range(count):
        longest = rng.choice([30, 700, 3000, 20_000])
        yield rng.randint(1, longest), rng.randint(1, longest)


@pytest.mark.parametrize(
    "tile, patch, grids", [(336, 14, FIVE), (336, 14, SIX), (224, 32, ONE), (30, 4, FIVE), (28, 14, SIX)]
)
def test_tokens_equal_transformers(tile, patch, grids):
    grid, side = pinpoints_of(tile, grids), tile // patch
    for size in random_sizes(400):
        best = select_best_resolution(size, grid)
        assert best == oracle_best_resolution(size, grid)
        rows, cols = best[0] // tile, best[1] // tile
        kept, newlines = LlavaNextProcessor._get_unpadded_features(None, *size, side, side, rows, cols)
        assert num_visual_tokens(size, grid, tile, patch) == side * side + kept + newlines, size

        cells = torch.arange(rows * side * cols * side).view(1, rows * side, cols * side)
        top, left, kept_rows, kept_cols = unpadded_grid(size, best, tile, side)
        ours = cells[:, top : top + kept_rows, left : left + kept_cols]
        assert torch.equal(ours, unpad_image(cells, size)), size


def test_best_resolution_of_nothing():
    with pytest.raises(InputError, match="0x5"):
        select_best_resolution((0, 5), HUB)
    with pytest.raises(InputError, match="pinpoint"):
        select_best_resolution((5, 5), [])


@pytest.mark.parametrize("grids", [ONE, FIVE, SIX])
@pytest.mark.parametrize("tile, patch", [(28, 14), (30, 4), (12, 4)])
def test_stitch_equals_transformers(tile, patch, grids):
    grid, side = pinpoints_of(tile, grids), tile // patch
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=tile, patch_size=patch), image_grid_pinpoints=grid
    )
    newline = torch.randn(5)
    for size in [(1, 1), (1, 10000), (10000, 1), (480, 640), (333, 500), *random_sizes(20)]:
        rows, cols = (edge // tile for edge in select_best_resolution(size, grid))
        features = torch.randn(1 + rows * cols, side * side, 5)
        thumbnail, cells = stitch(features, size, grid, tile)
        column = newline.expand(cells.shape[0], 1, 5)
        ours = torch.cat([thumbnail, torch.cat([cells, column], dim=1).flatten(0, 1)])
        packed, lengths = LlavaNextModel.pack_image_features(
            SimpleNamespace(config=config), [features], torch.tensor([size]), "default", newline
        )
        assert torch.equal(ours, packed[0]), size
        assert len(ours) == lengths[0] == num_visual_tokens(size, grid, tile, patch)


def test_stitch_passes_gradients_to_what_it_keeps():
    features = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    thumbnail, cells = stitch(features, (20, 60), [[28, 56]], 28)
    assert thumbnail.shape == (4, 2) and cells.shape == (2, 4, 2) and cells.dtype == torch.float64
    thumbnail, cells = stitch(features, (1, 60), [[28, 56]], 28)
    assert cells.shape == (0, 4, 2)
    (thumbnail.sum() + cells.sum()).backward()
    assert features.grad[0].eq(1).all() and features.grad[1:].eq(0).all()


@pytest.mark.parametrize("shape", [(1, 4, 2), (2, 4, 2), (4, 4, 2), (3, 5, 2)])
def test_stitch_refuses_other_counts(shape):
    with pytest.raises(InputError, match=r"10x20 picture has 1 \+ 1 \* 2 views.*got"):
        stitch(torch.zeros(shape), (10, 20), [[28, 56]], 28)
