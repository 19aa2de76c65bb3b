"""Random picture files: PNGs of every kind that the format has, written here, and JPEGs of every kind that Pillow writes."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
from PIL import Image

PNG_KINDS = [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (3, 1), (3, 2), (3, 4), (3, 8)]
PNG_KINDS += [(4, 8), (4, 16), (6, 8), (6, 16)]  # colour type, bits
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a colour type
# Of each pass of an interlaced PNG: the first row, from row to row, the first column, from column to column.
_ADAM7 = [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(height: int, width: int, bits: int, colour: int, *chunks: bytes, interlaced: bool = False) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    return b"".join([b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *chunks, chunk(b"IEND", b"")])


def png_data(samples: np.ndarray, bits: int, interlaced: bool = False) -> bytes:
    """What IDAT chunks hold: samples [height, width, channels], deflated."""

    def lines(part: np.ndarray) -> bytes:
        if bits == 16:
            rows = part.astype(">u2").reshape(len(part), -1).view(np.uint8)
        else:
            places = np.arange(bits - 1, -1, -1)
            rows = np.packbits((part.reshape(len(part), -1, 1) >> places & 1).reshape(len(part), -1), axis=1)
        return np.pad(rows, ((0, 0), (1, 0))).tobytes()  # filter 0

    passes = [samples[y::down, x::across] for y, down, x, across in _ADAM7] if interlaced else [samples]
    return zlib.compress(b"".join(lines(part) for part in passes if part.size), 1)


def random_png(draw: random.Random) -> bytes:
    """Any kind and size, interlaced or not, perhaps with a transparent value or alphas of a palette, gamma, and metadata."""
    (colour, bits), (height, width) = draw.choice(PNG_KINDS), draw_size(draw, 20)
    numpy, top, interlaced = np.random.default_rng(draw.getrandbits(32)), 2**bits - 1, draw.random() < 0.4
    samples = numpy.integers(0, top + 1, (height, width, _CHANNELS[colour]))
    if draw.random() < 0.5:  # few values, so that many are transparent
        samples = numpy.choice(samples.reshape(-1)[:4], samples.shape)
    before, entries = [], draw.randint(1, 2**bits) if colour == 3 else 0
    if draw.random() < 0.3:
        before.append(chunk(b"gAMA", struct.pack(">I", draw.choice([100000, 45455, 1]))))
    if colour == 3 or (colour in (2, 6) and draw.random() < 0.2):
        before.append(chunk(b"PLTE", numpy.bytes(3 * (entries or 3))))
    clear = b""
    if colour == 3:
        clear = numpy.bytes(draw.randint(0, entries + 3))
    elif draw.random() < 0.5:  # of shallow samples, bits that are not theirs may be set
        more = draw.choice([0, 0, 0x100]) if bits < 16 else draw.choice([0, 0, 1])
        clear = b"".join(struct.pack(">H", value ^ more) for value in samples[0, 0].tolist())
    data = png_data(samples, bits, interlaced)
    cut = draw.randint(0, len(data))
    pixels = [chunk(b"IDAT", data[:cut]), chunk(b"IDAT", data[cut:])]
    after = [before.pop()] if before and before[-1][4:8] == b"gAMA" and draw.random() < 0.2 else []
    (before if draw.random() < 0.9 else after).extend([chunk(b"tRNS", clear)] if clear else [])
    for kind, content in _png_metadata(draw):
        (before if draw.random() < 0.5 else after).append(chunk(kind, content))
    return png(height, width, bits, colour, *before, *pixels, *after, interlaced=interlaced)


def _png_metadata(draw: random.Random) -> list[tuple[bytes, bytes]]:
    packet, profile = xmp(draw), b"\nexif\n  99\n" + b"\n".join([exif(draw).hex().encode(), b""])
    return [
        each
        for each in [
            (b"eXIf", exif(draw)),
            (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet),
            (b"iTXt", b"XML:com.adobe.xmp\0\1\0en\0\0" + zlib.compress(packet)),
            (b"zTXt", b"XML:com.adobe.xmp\0\0" + zlib.compress(packet)),
            (b"tEXt", b"Raw profile type exif\0" + profile),
            (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)),
            (b"tEXt", b"Comment\0" + packet),
        ]
        if draw.random() < 0.1
    ]


def random_jpeg(draw: random.Random) -> bytes:
    """Greys, colours and inks, in one scan or several, of any size and subsampling, perhaps with metadata."""
    mode, (height, width) = draw.choice(["L", "RGB", "RGB", "CMYK"]), draw_size(draw, 40)
    numpy = np.random.default_rng(draw.getrandbits(32))
    few = numpy.integers(0, 256, (draw.randint(1, height), draw.randint(1, width), 4), dtype=np.uint8)
    image = Image.fromarray(few, "CMYK").resize((width, height)).convert(mode)
    options = {"subsampling": draw.choice([0, 1, 2])} if mode == "RGB" else {}
    if draw.random() < 0.3:
        options["restart_marker_rows"] = 1
    if draw.random() < 0.4:
        options["exif"] = b"Exif\0\0" * draw.randint(0, 2) + exif(draw)
    if draw.random() < 0.3:
        options["xmp"] = xmp(draw)
    if mode == "RGB" and draw.random() < 0.1:
        options |= {"keep_rgb": True, "subsampling": 0}
    file = io.BytesIO()
    image.save(file, "JPEG", quality=draw.randint(1, 100), progressive=draw.random() < 0.4, **options)
    return file.getvalue()


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Cut off somewhere, or with a few other bytes in it, or both."""
    changed = bytearray(content)
    for _ in range(draw.choice([0, 1, 1, 2, 5])):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed[: draw.randrange(len(changed))] if draw.random() < 0.4 else changed)


def exif(draw: random.Random) -> bytes:
    """A TIFF directory with an orientation among a few entries, of any type, in the entry or behind, often damaged."""
    order, number = draw.choice("<>"), draw.randint(0, 9)
    entries = draw.choice([1, 1, 2, 3, 5])
    behind = 8 + 2 + 12 * entries + 4
    values = struct.pack(order + "IIiidfHHbbbb", number, 1, -number, -1, number, number, number, 0, number, 0, 0, 0)
    directory = struct.pack(order + "H", entries + draw.choice([0, 0, 0, 0, -1, 2]))
    for _ in range(entries):
        kind, count = draw.choice([3, 3, 3, 4, draw.randint(0, 17)]), draw.choice([1, 1, 1, 1, 0, 2, 2**30])
        place = draw.choice([0, 8, 16, 24, 28, 32, 1000]) + behind
        value = draw.choice([values[28:32], values[28:32], values[:4], struct.pack(order + "I", place)])
        directory += struct.pack(order + "HHI", draw.choice([0x0112, 0x0112, 0x010F]), kind, count) + value
    version = draw.choice([42, 42, 42, 42, 42, 43, 0x2A00, 0x2B00, 7])
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", version, draw.choice([8, 8, 8, 8, 2**31]))
    content = head + directory + bytes(4) + values
    return content[: draw.randint(0, len(content))] if draw.random() < 0.2 else content


def xmp(draw: random.Random) -> bytes:
    forms = [b'<x tiff:Orientation="%d"/>', b"tiff:Orientation tiff:Orientation>%d<", b'tiff:Orientation="x%d']
    return draw.choice(forms) % draw.randint(0, 9)


def draw_size(draw: random.Random, longest: int) -> tuple[int, int]:
    """(height, width), a sliver now and then."""
    most = draw.choice([(longest, longest), (longest, longest), (1, 20 * longest), (20 * longest, 1), (9, 9)])
    return draw.randint(1, most[0]), draw.randint(1, most[1])
