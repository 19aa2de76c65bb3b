"""Encoded pictures in C++ against open_image: every kind of PNG and JPEG, whole and damaged."""

from __future__ import annotations

import functools
import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from encoded_pictures import chunk, damaged, exif, png, png_data, random_jpeg, random_png
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from runtime_pictures import LIBRARIES, SOURCES, Refused, RuntimePictures

from minifocus.errors import InputError
from minifocus.inputs.open_image import MAX_PIXELS, open_image

SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def runtime(compile_pieces) -> RuntimePictures:
    return RuntimePictures(compile_pieces("pictures", SOURCES, LIBRARIES))


def opened(content: bytes) -> np.ndarray:
    """What Python makes of a file's content. Raises InputError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged metadata
        try:
            image = Image.open(io.BytesIO(content), formats=["PNG", "JPEG"])
        except Exception as error:  # on damaged data, Pillow raises nearly any class
            raise InputError(str(error)) from error
        return np.asarray(open_image(image))


def file_of(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------ whole pictures


@given(seed=SEEDS)
def test_pngs_are_what_python_sees(runtime, seed):
    content = random_png(random.Random(seed))
    assert np.array_equal(runtime.decode(content), opened(content))


@given(seed=SEEDS)
def test_jpegs_are_what_python_sees(runtime, seed):
    content = random_jpeg(random.Random(seed))
    assert np.array_equal(runtime.decode(content), opened(content))


def test_every_sample_with_every_alpha_and_every_ink_with_black(runtime):
    """The two roundings that a picture goes through."""
    samples = np.stack(np.meshgrid(np.arange(256), np.arange(256)), axis=-1)
    content = png(256, 256, 8, 4, chunk(b"IDAT", png_data(samples, 8)))
    assert np.array_equal(runtime.decode(content), opened(content))
    # Blocks of one value, which the best quality stores as they are.
    inks, black = (np.kron(half, np.ones((8, 8))) for half in np.meshgrid(np.arange(256), np.arange(0, 256, 3)))
    inks = np.stack([inks, 255 - inks, inks, black], axis=-1).astype(np.uint8)
    content = file_of(Image.fromarray(inks, "CMYK"), "JPEG", quality=100)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), inks)
    assert np.array_equal(runtime.decode(content), opened(content))


def test_every_level_of_deep_greys(runtime):
    samples = np.arange(65536).reshape(256, 256, 1)
    for clear in (b"", chunk(b"tRNS", struct.pack(">H", 12345))):
        content = png(256, 256, 16, 0, clear, chunk(b"IDAT", png_data(samples, 16)))
        assert np.array_equal(runtime.decode(content), opened(content))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(10))
def test_pictures_are_upright(runtime, kind, orientation):
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    tags = Image.Exif()
    tags[0x0112] = orientation
    content = file_of(Image.fromarray(noise), kind, exif=tags)
    assert runtime.decode(content).shape == ((7, 5, 3) if 5 <= orientation <= 8 else (5, 7, 3))
    assert np.array_equal(runtime.decode(content), opened(content))


@given(seed=SEEDS)
def test_exif_of_every_kind(runtime, seed):
    """Ten orientations as cameras, editors and accidents write them."""
    draw = random.Random(seed)
    pixels = chunk(b"IDAT", png_data(np.arange(6).reshape(2, 3, 1), 8))
    for _ in range(10):
        content = png(2, 3, 8, 0, chunk(b"eXIf", exif(draw)), pixels)
        assert np.array_equal(runtime.decode(content), opened(content))


TURN = (0x0112, 3, 1, 6)


@pytest.mark.parametrize(("entries", "turned"), [
    ([TURN, (0x0112, 3, 1, 3)], True),  # the first counts
    ([(0x010F, 2, 1, 65), (0x010F, 4, 2, 1000), TURN], True),
    ([(0x010F, 4, 2**20, 8), TURN], True),  # more than the file has
    ([(0x010F, 4, 2, 1000), TURN], False),  # outside of the file: nothing behind it is read
    ([(0x0112, 3, 0, 3), TURN], True),
    ([(0x0112, 99, 1, 3), TURN], True),
    ([(0x0112, 1, 1, 6), TURN], False),  # bytes are no number
])  # fmt: skip
def test_damaged_entries_of_exif(runtime, entries, turned):
    """tag, type, count, and value or place, little-endian"""
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    tiff = chunk(b"eXIf", b"II*\0\x08\0\0\0" + directory)
    content = png(2, 3, 8, 0, tiff, chunk(b"IDAT", png_data(np.arange(6).reshape(2, 3, 1), 8)))
    assert runtime.decode(content).shape == ((3, 2, 3) if turned else (2, 3, 3))
    assert np.array_equal(runtime.decode(content), opened(content))


def test_slivers_of_millions_of_pixels(runtime):
    for height, width in ((1, 3_000_000), (3_000_000, 1)):
        samples = (np.arange(3_000_000) % 251).reshape(height, width, 1)
        content = png(height, width, 8, 0, chunk(b"IDAT", png_data(samples, 8)))
        assert np.array_equal(runtime.decode(content)[:, :, 1:2], samples)


# ---------------------------------------------------------------------------------------------------- damaged pictures


@pytest.mark.parametrize("make", [random_png, random_jpeg])
@given(seed=SEEDS)
def test_damage_is_refused_or_makes_no_difference(runtime, make, seed):
    """The runtime refuses more: a PNG whose checksums are wrong or whose end is missing, and a progressive JPEG some of whose
    scans are missing, of which two versions of libjpeg make two pictures."""
    draw = random.Random(seed)
    content = damaged(make(draw), draw)
    try:
        ours = runtime.decode(content)
    except Refused as error:
        assert str(error).startswith("the file: ")
        return
    assert np.array_equal(ours, opened(content))


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("options", [{"format": "PNG"}, {"format": "JPEG"}, {"format": "JPEG", "progressive": True}])
def test_every_cut_is_refused(runtime, options):
    """Wherever a JPEG is cut, Python agrees: it is whole but for its last bytes, or refused."""
    file = io.BytesIO()
    noise(9, 11).save(file, **options)
    content, whole = file.getvalue(), runtime.decode(file.getvalue())
    refused = 0
    for end in range(len(content)):
        try:
            ours = runtime.decode(content[:end])
        except Refused as error:
            refused += 1
            if options["format"] == "JPEG":
                with pytest.raises(InputError):
                    opened(content[:end])
            assert str(error).startswith("the file: ")
            continue
        assert np.array_equal(ours, whole) and np.array_equal(opened(content[:end]), whole)
    assert refused >= len(content) - 2


def endless_zeros(count: int) -> bytes:
    """`count` MiB of zeros, deflated, without an end."""
    deflate = zlib.compressobj(wbits=-15)
    return b"\x78\x01" + count * (deflate.compress(bytes(2**20)) + deflate.flush(zlib.Z_FULL_FLUSH))


@functools.cache
def bad_files() -> dict[str, tuple[bytes, str]]:
    """name: (content, what its message says)"""
    webp, jpeg = file_of(noise(5, 6), "WEBP"), file_of(noise(50, 60), "JPEG", progressive=True)
    scan = jpeg.index(b"\xff\xda")  # the first one's tables are before it
    next_scan = jpeg.index(b"\xff\xc4", scan)
    nothing = chunk(b"IDAT", zlib.compress(b""))
    grey = png_data(np.zeros((2, 2, 1), int), 8)
    return {
        "nothing": (b"", "expected a PNG or a JPEG, got 0 bytes"),
        "text": (b"This is no picture.", "expected a PNG or a JPEG, got 19 bytes"),
        "another format": (webp, "expected a PNG or a JPEG"),
        "no pixels": (png(0, 5, 8, 0, nothing), "not a picture that can be read: "),
        "too many pixels": (png(8_948, 10_000, 1, 0, nothing), "89480000 pixels (height x width) are over the limit"),
        "far too many": (png(2**31 - 1, 2**31 - 1, 16, 6, nothing), f"over the limit of {MAX_PIXELS}"),
        "most pixels": (png(9_459, 9_459, 1, 0, nothing), "not a picture that can be read: "),
        "too many in a JPEG": (b"\xff\xd8\xff\xc0\0\x0b\x08\xff\xdc\xff\xdc\x01\x01\x11\0", "not a picture"),
        "a short key": (png(2, 2, 8, 2, chunk(b"tRNS", b"\0\0\0"), nothing), "tRNS: expected 6 bytes, got 3"),
        "no palette": (png(2, 2, 8, 3, chunk(b"IDAT", grey)), "not a picture that can be read: "),
        "a chunk of 2 GB": (png(2, 2, 8, 0)[:33] + struct.pack(">I", 2**31 - 1) + b"tEXtabc", "not a picture that can be read: "),
        "a thousand texts": (png(2, 2, 8, 0, *[chunk(b"tEXt", b"a\0b")] * 1000, nothing), "expected fewer than 998 chunks"),
        "pixels beyond the last": (png(2, 2, 8, 0, chunk(b"IDAT", endless_zeros(200))), "far more pixels than"),
        "one scan of ten": (jpeg[:next_scan] + b"\xff\xd9", "scans of a progressive JPEG are missing"),
        "a thousand scans": (jpeg[:-2] + jpeg[jpeg.rindex(b"\xff\xc4") : -2] * 1000 + b"\xff\xd9", "more than 100 scans"),
    }  # fmt: skip


@pytest.mark.parametrize("name", bad_files())
def test_bad_files_are_named(runtime, name):
    content, words = bad_files()[name]
    with pytest.raises(Refused) as error:
        runtime.decode(content)
    assert str(error.value).startswith("the file: ") and words in str(error.value)


def test_text_that_inflates_to_gigabytes_is_passed_over(runtime):
    """It is no orientation, and nothing else is asked of it."""
    bomb = chunk(b"zTXt", b"XML:com.adobe.xmp\0\0" + zlib.compress(bytes(2**24)))
    content = png(2, 3, 8, 0, *[bomb] * 20, chunk(b"IDAT", png_data(np.full((2, 3, 1), 7), 8)))
    assert (runtime.decode(content) == 7).all()
