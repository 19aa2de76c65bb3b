"""Pictures of every format and mode as a viewer shows them, and every kind of bad picture."""

import base64
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
from pictures import picture
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb

import minifocus
from minifocus.errors import InputError
from minifocus.inputs.open_image import _AS_CONTENT, open_image

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
from minifocus.inputs.image_processor import ImageProcessor
from minifocus.inputs.open_image import open_image

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
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(minifocus.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    bomb, slivers = map(int, done.stdout.split())
    assert bomb < 16  # MiB
    assert slivers < 400
