"""The photographs in scikit-image's wheel that are asked about, as they are or cut into pieces.

By its documentation (skimage.data) they are free to use: astronaut by NASA, rocket by SpaceX, both in the public domain; camera
by Lav Varshney, chelsea by Stefan van der Walt, coffee by Rachel Michetti (courtesy of Pikolo Espresso Bar), all three CC0.
"""

from __future__ import annotations

from PIL import Image

from minifocus.cards.packages import package_folder
from minifocus.inputs.open_image import open_image

Asked = tuple[Image.Image, str]

QUESTIONS = {
    "coffee.png": "What is in the cup?",
    "chelsea.png": "What colour are the eyes of the cat?",
    "astronaut.png": "Where is the flag?",
    "rocket.jpg": "Is it day or night?",
    "camera.png": "What does the man look at?",
}
PIECE = 224  # pixels of a piece's side


def photographs(count: int = len(QUESTIONS)) -> list[Asked]:
    """The first `count` photographs, each with its question. Raises InputError where scikit-image is not installed."""
    folder = package_folder("skimage") / "data"  # not imported, which would take scipy with it
    return [(open_image(folder / name), question) for name, question in list(QUESTIONS.items())[:count]]


def pieces(count: int) -> list[Asked]:
    """Square pieces of PIECE pixels, no two alike: a corner of each photograph in turn, then another corner. At most 20."""
    found = []
    for down, across in ((0, 0), (1, 1), (0, 1), (1, 0)):
        for image, question in photographs():
            side = round(0.6 * min(image.size))
            left, top = across * (image.width - side), down * (image.height - side)
            piece = image.crop((left, top, left + side, top + side)).resize((PIECE, PIECE), Image.Resampling.BICUBIC)
            found.append((piece, question))
    return found[:count]
