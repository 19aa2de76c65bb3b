"""Files of questions: ours, LLaVA's, and conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minifocus.errors import InputError
from minifocus.inputs.questions import read_questions

SIGN: dict[str, Any] = {"id": "7", "image": "a.png", "question": "What does the sign say?"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def write(folder: Path, *lines: Any) -> Path:
    file = folder / "questions.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def test_what_is_asked(folder: Path) -> None:
    said = [{"from": "human", "value": "<image>\nA?"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": "B?"}]
    lines = [
        SIGN,
        {"question_id": 3, "image": "b.png", "text": "Is it so?", "category": "conv"},
        "",
        {"images": ["a.png", "b.png"], "question": "<image> and <image>: the same?"},
        {"question": "Who are you?"},
        {"id": "c", "image": "a.png", "conversations": [*said, {"from": "gpt", "value": "b"}]},
    ]
    questions = read_questions(write(folder, *lines))
    assert [one.about for one in questions] == [
        {"id": "7", "images": ["a.png"], "question": "What does the sign say?"},
        {"id": 3, "images": ["b.png"], "question": "Is it so?"},
        {"id": 2, "images": ["a.png", "b.png"], "question": "<image> and <image>: the same?"},
        {"id": 3, "images": [], "question": "Who are you?"},
        {"id": "c", "images": ["a.png"], "turn": 0, "question": "<image>\nA?"},
        {"id": "c", "images": ["a.png"], "turn": 1, "question": "B?"},
    ]
    assert [one.text for one in questions] == [one.about["question"] for one in questions]
    assert list(questions[2].images) == [folder / "a.png", folder / "b.png"]
    assert questions[2].place == f"{folder / 'questions.jsonl'}: line 4"


BAD: list[tuple[Any, str]] = [
    ("{", "line 2: not readable as JSON"),
    ([], "line 2: expected an object, got []"),
    ({"id": "1", "image": "a.png"}, "line 2: question: expected text, got no such key"),
    (SIGN | {"question": " <image> "}, "line 2: question: expected text, got ' <image> '"),
    (SIGN | {"question": 7}, "line 2: question: expected text, got 7"),
    (SIGN | {"question": "a\udcff"}, "line 2: question: expected whole characters"),
    (SIGN | {"id": 1.5}, "line 2: id: expected text or a whole number, got 1.5"),
    (
        SIGN | {"question": "<image> <image> which?"},
        "line 2: question: expected one <image> for each of 1 pictures, or none",
    ),
    (SIGN | {"question": "<video> what?"}, "line 2: question: expected no placeholder but <image>"),
    (SIGN | {"video": "a.mp4"}, "line 2: video: expected no picture, film or sound that is not under"),
    (SIGN | {"image": "../a.png"}, "line 2: image: expected a name inside of"),
    (SIGN | {"image": "https://a/b.png"}, "line 2: image: expected the name of a file, and not a URL"),
    (SIGN | {"image": "none.png"}, "none.png: no such file"),
    (SIGN | {"image": [""]}, "line 2: image: expected a picture's name or a list of them"),
    ({"conversations": []}, "line 2: conversations: expected questions with an answer to each"),
    ('{"id": 1, "id": 2, "question": "?"}', "a key is there twice"),
]


@pytest.mark.parametrize(("line", "words"), BAD, ids=[words[:50] for _, words in BAD])
def test_what_is_refused(folder: Path, line: Any, words: str) -> None:
    with pytest.raises(InputError) as error:
        read_questions(write(folder, SIGN, line))
    assert str(error.value).startswith(str(folder / "questions.jsonl")) and words in str(error.value)


def test_so_many_are_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"line 1: .*; line 5: .* \(and 2 more\)$"):
        read_questions(write(folder, *[SIGN | {"image": f"none-{n}.png"} for n in range(7)]))
    with pytest.raises(InputError, match="expected at least one question, got none"):
        read_questions(write(folder))
    with pytest.raises(InputError, match="expected a folder with pictures, found nothing"):
        read_questions(write(folder, SIGN), folder / "none")
    assert len(read_questions(write(folder, SIGN | {"image": str(folder / "a.png")}), images_anywhere=True)) == 1
