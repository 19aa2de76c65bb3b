"""What is behind and between the things of a scene: photographs, textures, confetti, and shapes that are never asked about.

No photograph and no kind of texture is in two splits. The photographs come with scikit-image, whose documentation names each
as CC0, as in the public domain or as without known restrictions. Confetti and distractors have the colours of the things that
are asked about, so that neither brightness nor colour tells what matters.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from .packages import package_folder
from .scene import COLOURS, Box

PHOTOGRAPHS = {
    "train": (
        "astronaut.png",
        "camera.png",
        "coffee.png",
        "grass.png",
        "brick.png",
        "hubble_deep_field.jpg",
        "ihc.png",
    ),
    "validation": ("rocket.jpg", "coins.png"),
    "test": ("chelsea.png", "gravel.png", "retina.jpg"),
}
TEXTURES = {"train": ("stripes", "blotches", "bricks"), "validation": ("checks",), "test": ("plaid", "rings")}
DISTRACTORS = ("ring", "cross", "heart", "arrow", "burst", "moon")


@cache
def _photograph(name: str) -> Image.Image:
    with Image.open(package_folder("skimage") / "data" / name) as file:
        image = file.convert("RGB")
    image.thumbnail((640, 640))
    return image


def _cut_out(rng: np.random.Generator, name: str, width: int, height: int) -> np.ndarray:
    """Some part of a photograph, perhaps mirrored, in some light: float32 [height, width, 3]."""
    photograph = _photograph(name)
    scale = rng.uniform(0.4, 1) * min(photograph.width / width, photograph.height / height)
    w, h = width * scale, height * scale
    x, y = rng.uniform(0, photograph.width - w), rng.uniform(0, photograph.height - h)
    part = photograph.resize((width, height), Image.Resampling.BILINEAR, (x, y, x + w, y + h))
    pixels = np.asarray(part, np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return (pixels - 128) * rng.uniform(0.6, 1) + 128 + rng.uniform(-25, 25, 3).astype(np.float32)


def _texture(rng: np.random.Generator, kind: str, width: int, height: int) -> np.ndarray:
    """Two muted colours, mixed by a pattern: float32 [height, width, 3]."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle, period = rng.uniform(0, math.pi), rng.uniform(8, 28)
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    match kind:
        case "stripes":
            share = np.sin(along * (2 * math.pi / period))
        case "bricks":
            row = y // period
            share = np.where((y % period < 2) | ((x + row % 2 * period) % (2 * period) < 2), 1.0, -0.5)
        case "checks":
            share = np.sign(np.sin(along * (2 * math.pi / period)) * np.sin(across * (2 * math.pi / period)))
        case "plaid":
            share = 0.5 * np.sin(x * (2 * math.pi / period)) + 0.5 * np.sin(y * (4 * math.pi / period))
        case "rings":
            middle = rng.uniform(0, 1, 2) * (width, height)
            share = np.sin(np.hypot(x - middle[0], y - middle[1]) * (2 * math.pi / period))
        case _:
            small = rng.uniform(-1, 1, (max(2, height // 12), max(2, width // 12))).astype(np.float32)
            share = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    base, other = rng.uniform(70, 190) + rng.uniform(-35, 35, 3), rng.uniform(-45, 45, 3)
    return (base + other * share[..., None]).astype(np.float32)


def draw_background(rng: np.random.Generator, split: str, width: int, height: int) -> np.ndarray:
    """A photograph or a texture with grain and confetti on it: float32 [height, width, 3] in 0 … 255."""
    if rng.random() < 0.5:
        pixels = _cut_out(rng, str(rng.choice(PHOTOGRAPHS[split])), width, height)
    else:
        pixels = _texture(rng, str(rng.choice(TEXTURES[split])), width, height)
    pixels = pixels + rng.normal(0, 3, (height, width, 1)).astype(np.float32)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    palette = np.array(list(COLOURS.values()))
    for _ in range(int(width * height / rng.uniform(700, 3000))):
        colour = tuple(int(v) for v in palette[rng.integers(len(palette))] + rng.integers(-10, 11, 3))
        x, y, angle, size = (
            rng.uniform(0, width),
            rng.uniform(0, height),
            rng.uniform(0, 2 * math.pi),
            rng.uniform(2, 6),
        )
        dx, dy = size * math.cos(angle), size * math.sin(angle)
        if rng.random() < 0.5:
            pen.line((x - dx, y - dy, x + dx, y + dy), fill=colour, width=2)
        else:
            pen.polygon([(x + dx, y + dy), (x - dy, y + dx), (x + dy, y - dx)], fill=colour)
    return np.array(image, np.float32)


@cache
def _mask(kind: str, size: int) -> np.ndarray:
    """Coverage of a distractor that fills a square of ``size`` pixels: float32 [size, size, 1] in 0 … 1."""
    big = 4 * size
    mask = Image.new("L", (big, big), 0)
    pen, last = ImageDraw.Draw(mask), big - 1

    def polygon(*corners: tuple[float, float]) -> None:
        pen.polygon([(x * last, y * last) for x, y in corners], fill=255)

    match kind:
        case "ring":
            pen.ellipse((0, 0, last, last), outline=255, width=max(4, big // 5))
        case "cross":
            polygon((0, 0.36), (0.36, 0.36), (0.36, 0), (0.64, 0), (0.64, 0.36), (1, 0.36))
            polygon((1, 0.36), (1, 0.64), (0.64, 0.64), (0.64, 1), (0.36, 1), (0.36, 0.64), (0, 0.64), (0, 0.36))
        case "heart":
            pen.ellipse((0, 0.05 * last, 0.54 * last, 0.55 * last), fill=255)
            pen.ellipse((0.46 * last, 0.05 * last, last, 0.55 * last), fill=255)
            polygon((0.04, 0.4), (0.96, 0.4), (0.5, 1))
        case "arrow":
            polygon((0, 0.35), (0.5, 0.35), (0.5, 0.05), (1, 0.5), (0.5, 0.95), (0.5, 0.65), (0, 0.65))
        case "burst":
            angles = [i * math.pi / 12 for i in range(24)]
            radii = [0.5 if i % 2 else 0.33 for i in range(24)]
            polygon(*((0.5 + r * math.cos(a), 0.5 + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)))
        case _:
            pen.ellipse((0, 0, last, last), fill=255)
            pen.ellipse((0.3 * last, -0.1 * last, 1.2 * last, 0.8 * last), fill=0)
    return np.asarray(mask.resize((size, size), Image.Resampling.LANCZOS), np.float32)[..., None] / 255


def draw_distractor(rng: np.random.Generator, pixels: np.ndarray, box: Box) -> None:
    """Paint a distractor of some kind, colour and direction into a square box."""
    left, top, right, bottom = box
    mask = np.rot90(_mask(str(rng.choice(DISTRACTORS)), right - left), int(rng.integers(4)))
    palette = np.array(list(COLOURS.values()), np.float32)
    colour = palette[rng.integers(len(palette))] + rng.uniform(-12, 12, 3).astype(np.float32)
    area = pixels[top:bottom, left:right]
    area[:] = area * (1 - mask) + colour * mask
