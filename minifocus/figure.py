"""Draws what the samplers did to a picture: the scale chosen for each region, and which tokens the question kept."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from .inputs.image_processor import ImageProcessor
from .trace import Answer, PictureTrace

PANEL = 448  # pixels, the longer side of a panel
MARGIN = 16
INK, PAPER = (30, 30, 30), (255, 255, 255)


def draw_answers(
    pictures: Sequence[Image.Image], asked: Sequence[tuple[str, Answer]], processor: ImageProcessor | None = None
) -> Image.Image:
    """One row per picture: left the scales, then for each question the importance of the tokens that reached the last layer.

    Where nothing acts inside the language model, it is the scales for each question, which is what AVG-LLaVA's router chooses.

    pictures   as they were asked about (RGB)
    asked      questions, all about these pictures, with their answers; the scales on the left are those of the first
    processor  the model's, which crops a picture to what the model sees (most LLaVA-1.5 see the centre square); None: no crop
    """
    inside = any(
        len(t.kept) < len(t.entered) or bool(t.importance.isfinite().any()) for _, a in asked for t in a.pictures
    )
    rows = []
    for number, picture in enumerate(pictures):
        shown = _fit(picture if processor is None else picture.crop(processor.seen((picture.height, picture.width))))
        traces = [answer.pictures[number] for _, answer in asked]
        if inside:
            rows.append([_draw_scales(shown, traces[0]), *(_draw_importance(shown, trace) for trace in traces)])
        else:
            rows.append([_draw_scales(shown, trace) for trace in traces])
    column = max([panel.width for row in rows for panel in row], default=PANEL) + MARGIN
    tokens = asked[0][1].tokens
    captions = [["scale of each token", f"{tokens.full} visual tokens > {tokens.after_vision}"]] if inside else []
    for question, answer in asked:
        text = [*textwrap.wrap(f"Q: {question}", column // 9), *textwrap.wrap(f"A: {answer.text}", column // 9)]
        kept = f"> {answer.tokens.after_text} tokens, equivalent {answer.tokens.equivalent:.0%}"
        captions.append([*text, kept])
    lines = max(len(own) for own in captions)
    height = 2 * MARGIN + 22 * lines + sum(row[0].height + MARGIN for row in rows)
    sheet = Image.new("RGB", (MARGIN + column * len(captions), height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, own in enumerate(captions):
        for line, caption in enumerate(own, lines - len(own)):
            at = (MARGIN + column * number, MARGIN + 22 * line)
            draw.text(at, caption, fill=INK, font=ImageFont.load_default(17))
    top = 2 * MARGIN + 22 * lines
    for row in rows:
        for number, panel in enumerate(row):
            sheet.paste(panel, (MARGIN + column * number, top))
        top += row[0].height + MARGIN
    return sheet


def _fit(picture: Image.Image) -> Image.Image:
    scale = PANEL / max(picture.size)
    return picture.resize(
        (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.BICUBIC
    )


def _boxes(size: tuple[int, int], trace: PictureTrace) -> list[tuple[int, tuple[int, int, int, int]]]:
    """(number of the token among those that entered, its box in pixels) for each token of the map."""
    height, width = trace.layout.height, trace.layout.width
    boxes = []
    for number, cell in enumerate(trace.layout.cells(trace.entered).tolist()):
        if cell < 0:
            continue
        row, column = divmod(cell, width)
        down, across = trace.extent[number].tolist()
        bottom, right = row + down, column + across
        boxes.append(
            (
                number,
                (
                    column * size[0] // width,
                    row * size[1] // height,
                    right * size[0] // width - 1,
                    bottom * size[1] // height - 1,
                ),
            )
        )
    return boxes


def _draw_scales(picture: Image.Image, trace: PictureTrace) -> Image.Image:
    """Outline every token's box. The coarser the token, the paler the picture inside, as less of it is left."""
    sheet = picture.copy()
    veil = Image.new("L", picture.size, 0)
    boxes = _boxes(picture.size, trace)
    for number, box in boxes:
        area = int(trace.extent[number].prod())
        ImageDraw.Draw(veil).rectangle(box, fill={1: 0}.get(area, 70 if area <= 4 else 170))
    sheet.paste(Image.new("RGB", picture.size, PAPER), mask=veil)
    draw = ImageDraw.Draw(sheet)
    for number, box in boxes:
        area = int(trace.extent[number].prod())
        draw.rectangle(box, outline=(220, 40, 40) if area == 1 else (40, 90, 220) if area <= 4 else (150, 150, 150))
    return sheet


def _draw_importance(picture: Image.Image, trace: PictureTrace) -> Image.Image:
    """Darken dropped tokens, and tint kept ones by their importance relative to the largest."""
    boxes = _boxes(picture.size, trace)
    kept = set(trace.kept.tolist())
    light = Image.new("L", picture.size, 255)
    heat = Image.new("L", picture.size, 0)
    scores = trace.importance.nan_to_num(0.0)
    cells = torch.tensor([number for number, _ in boxes], dtype=torch.int64)
    largest = float(scores[cells].max()) if len(cells) else 0.0
    for number, box in boxes:
        if int(trace.entered[number]) not in kept:
            ImageDraw.Draw(light).rectangle(box, fill=45)
        elif largest > 0:
            ImageDraw.Draw(heat).rectangle(box, fill=round(190 * float(scores[number]) / largest))
    sheet = Image.composite(picture, Image.new("RGB", picture.size, INK), light)
    sheet.paste(Image.new("RGB", picture.size, (255, 90, 0)), mask=heat)
    return sheet
