"""The picture part of csrc/runtime under AddressSanitizer and UndefinedBehaviorSanitizer, leaks included."""

from __future__ import annotations

import random
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from compiled import SANITIZED, compiled
from encoded_pictures import damaged, random_jpeg, random_png
from runtime_pictures import LIBRARIES, SOURCES, Refused, RuntimePictures
from test_tiles import GRIDS, write_manifest

from minifocus.inputs.image_processor import ImageProcessor

PROCESSORS = {
    "next": ImageProcessor(True, 14, 14, grid_pinpoints=tuple((14 * rows, 14 * columns) for rows, columns in GRIDS)),
    "padded": ImageProcessor(False, 14, 20, pad=True, resample=1),
    "nearest": ImageProcessor(False, 14, (9, 30), resample=0),
}


@pytest.fixture(scope="module")
def program() -> Path:
    main = Path(__file__).with_name("pictures_under_sanitizers.cpp")
    return compiled([main, *SOURCES], LIBRARIES, SANITIZED)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, arguments)), capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("kind", PROCESSORS)
def test_pictures_touch_only_what_is_theirs(program, compile_pieces, tmp_path, kind):
    """Whole and damaged files, with what the plain build makes of each."""
    runtime = RuntimePictures(compile_pieces("pictures", SOURCES, LIBRARIES))
    draw, manifest, files, expected = random.Random(kind), write_manifest(tmp_path, PROCESSORS[kind]), [], []
    for number in range(150):
        content = draw.choice([random_png, random_jpeg])(draw)
        content = damaged(content, draw) if draw.random() < 0.7 else content
        files.append(tmp_path / f"{number:03}")
        files[-1].write_bytes(content)
        try:
            picture = runtime.decode(content)
        except Refused as error:
            expected.append(str(error).replace("the file: ", f"{files[-1]}: ", 1))
            continue
        values, _ = runtime.tiles(manifest, picture)
        sums = zlib.crc32(picture), zlib.crc32(np.ascontiguousarray(values))
        expected.append(" ".join(map(str, [*picture.shape[:2], *sums])))
    done = run(program, manifest, *files)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == expected


def test_a_planted_fault_is_seen(program):
    done = run(program, "planted")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
