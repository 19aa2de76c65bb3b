"""LLaVA's JSON format: what is read, what is refused and in which words; the miniature written in it and read back."""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from example_scripts import example
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import minifocus
from minifocus import cards
from minifocus.errors import InputError
from minifocus.evaluate import evaluate as evaluate_model
from minifocus.evaluate import wilson
from minifocus.inputs.conversations import Conversation, Turn, asked_alone, read_conversations
from minifocus.inputs.foreign_media import foreign_place
from minifocus.inputs.open_image import open_image
from minifocus.inputs.prompt import build_prompt
from minifocus.trace import TokenCounts

ROOT = Path(__file__).resolve().parents[2]


draw_cards, evaluation = example("draw_cards"), example("evaluate")


def human(value: Any) -> dict[str, Any]:
    return {"from": "human", "value": value}


def gpt(value: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": value}


SIGN = {
    "id": "sign",
    "image": "signs/a.png",
    "conversations": [human("<image>\nWhat does it say?"), gpt("stop"), human("In what colour?"), gpt("white")],
    "families": ["read", "perceive"],
}


def write(folder: Path, content: Any, name: str = "data.json") -> Path:
    """`content` as JSON, or text and bytes as they are, beside a file where SIGN's picture should be."""
    (folder / "signs").mkdir(exist_ok=True)
    (folder / "signs/a.png").touch()
    file = folder / name
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    file.write_bytes(content)
    return file


# ------------------------------------------------------------------------------------------------------------- reading


def test_a_record(tmp_path: Path) -> None:
    turns = (Turn("<image>\nWhat does it say?", "stop", "read"), Turn("In what colour?", "white", "perceive"))
    (found,) = read_conversations(write(tmp_path, [SIGN]))
    assert found == Conversation("sign", (tmp_path / "signs/a.png",), turns)
    file, elsewhere = write(tmp_path, [SIGN]), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "signs").rename(elsewhere / "signs")
    (found,) = read_conversations(str(file), elsewhere)
    assert found.images == (elsewhere / "signs/a.png",)


def test_what_a_record_may_leave_out_and_hold_besides(tmp_path: Path) -> None:
    said = [human("Why?"), gpt("So.")]
    records = [
        {"conversations": said},
        {"id": 7, "image": None, "families": None, "conversations": said, "model": ""},
        {"id": "7", "image": [], "conversations": said, "weights": [float("nan")]},
        {"id": 0, "conversations": said},
    ]
    assert read_conversations(write(tmp_path, records)) == [
        Conversation(name, (), (Turn("Why?", "So."),)) for name in ("0", "7", "7", "0")
    ]


def test_several_pictures_in_any_turn(tmp_path: Path) -> None:
    said = [human("Is <image> like <image>?"), gpt("no"), human("And this:\n<image>"), gpt("yes")]
    names = ["signs/a.png", "b.png", "signs/../b.png"]
    (tmp_path / "b.png").touch()
    for key in ("image", "images"):  # other projects' records differ from LLaVA's in this alone
        (found,) = read_conversations(write(tmp_path, [{key: names, "conversations": said}]))
        assert found.images == (tmp_path / "signs/a.png", tmp_path / "b.png", tmp_path / "b.png")
        assert [turn.question for turn in found.turns] == ["Is <image> like <image>?", "<image>\nAnd this:"]


def test_pictures_lie_inside_their_folder(tmp_path: Path) -> None:
    """Whoever put a link there owns the folder; whoever wrote a name may be anybody."""
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    for folder in (inner, outer / "deep"):
        folder.mkdir(parents=True)
    for picture in (tmp_path / "b.png", outer / "c.png", outer / "deep/d.png", inner / "b.png"):
        picture.touch()
    (inner / "link").symlink_to(outer / "deep")
    (inner / "link.png").symlink_to(tmp_path / "b.png")

    def read(name: str, anywhere: bool = False) -> Path | Image.Image:
        record = {"image": name, "conversations": [human("<image>\nWhy?"), gpt("So.")]}
        return read_conversations(write(inner, [record]), images_anywhere=anywhere)[0].images[0]

    assert read("link/d.png") == inner / "link/d.png" and read("link.png") == inner / "link.png"
    assert read("./link/../b.png") == inner / "b.png"  # by the system's reading: outer/b.png
    for name in (
        *(str(inner / "b.png"), "../b.png", "signs/../../b.png", "../inner/b.png", "link/../../b.png", "/etc/passwd"),
        *(
            r"..\b.png",
            r"signs\..\..\b.png",
            "C:b.png",
            r"C:\b.png",
            r"\b.png",
            r"\\host\share\b.png",
            "//host/share/b.png",
        ),
    ):
        with pytest.raises(InputError) as error:
            read(name)
        assert f"record 0: image: expected a name inside of {inner} (images_anywhere takes others), got " in str(
            error.value
        )
    assert read("../b.png", anywhere=True) == inner / "../b.png"
    assert read(str(outer / "c.png"), anywhere=True) == outer / "c.png"
    for name in ("https://example.org/b.png", "file:///etc/passwd", "data:image/png;base64," + "iVBOR" * 100_000):
        for anywhere in (False, True):
            with pytest.raises(InputError, match="image: expected the name of a file, and not a URL, got") as error:
                read(name, anywhere)
            assert len(str(error.value)) < len(str(inner)) + 300


@pytest.mark.parametrize(
    ("question", "read"),
    [
        ("<image>\nWhy?", "<image>\nWhy?"),
        ("<image> Why?", "<image> Why?"),
        ("Why?\n<image>", "<image>\nWhy?"),
        (" <image>Why?", "<image>\nWhy?"),
        ("What does <image> show?", "<image>\nWhat does  show?"),
    ],
)
def test_the_only_picture_of_a_question_goes_to_its_front(tmp_path: Path, question: str, read: str) -> None:
    """As `preprocess_multimodal` of LLaVA's public training code has it; most of its captions are "Describe …\\n<image>"."""
    record = {"image": "signs/a.png", "conversations": [human(question), gpt("So.")]}
    (found,) = read_conversations(write(tmp_path, [record]))
    assert found.turns[0].question == read


def test_a_first_turn_of_gpt_and_an_unanswered_question_are_left_out(tmp_path: Path) -> None:
    for said in ([gpt("Hello."), *SIGN["conversations"]], [*SIGN["conversations"], human("Sure?")]):
        record = {**SIGN, "conversations": said}
        assert read_conversations(write(tmp_path, [record])) == read_conversations(write(tmp_path, [SIGN]))


def test_json_lines(tmp_path: Path) -> None:
    """One record a line; a line ends at a line feed and nowhere else, and a record may hold U+2028 as it is."""
    second = {"conversations": [human("One\u2028two?"), gpt("three\x85")]}
    lines = [json.dumps(SIGN), "", json.dumps(second, ensure_ascii=False), " "]
    for end in ("\n", "\r\n"):
        first, last = read_conversations(write(tmp_path, end.join(lines), "data.JSONL"))
        assert first.id == "sign" and last == Conversation("1", (), (Turn("One\u2028two?", "three\x85"),))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    plain = write(tmp_path, [SIGN])
    assert read_conversations(write(tmp_path, b"\xef\xbb\xbf" + plain.read_bytes(), "mark.json")) == read_conversations(
        plain
    )


def test_pictures_are_looked_for_when_they_are_named_and_read_when_they_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name, words in (
        ("signs/b.png", "signs/b.png: no such file"),
        ("signs", "signs: expected a file, found a folder"),
        ("pipe.png", "pipe.png: expected a file, found a FIFO"),
        ("~/a.png", "~/a.png: no such file"),
        ("a%2Fb.png", "a%2Fb.png: no such file"),
        ("a" * 5000, "found a name that cannot be used (File name too long)"),
        ("\0", "found a name that cannot be used (embedded null byte)"),
        ("\ud800", r"\ud800: expected a file, found a name that cannot be used"),
    ):
        with pytest.raises(InputError) as error:
            read_conversations(write(tmp_path, [{**SIGN, "image": name}]))
        assert "record 0: image: " in str(error.value) and words in str(error.value)
        assert len(str(error.value)) < 2 * len(str(tmp_path)) + 300 and str(error.value).encode()
    (found,) = read_conversations(write(tmp_path, [SIGN]))
    with pytest.raises(InputError, match=r"signs/a\.png: not a picture that can be read"):
        open_image(found.images[0])


def test_what_cannot_be_used_is_told_at_once_and_may_be_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unanswered = {"conversations": [human("Why?")]}
    file = write(tmp_path, [unanswered, SIGN, *[{**SIGN, "image": f"{i}.png"} for i in range(5)], {**SIGN, "id": None}])
    listed = "record 0: conversations: expected questions with an answer to each, got 1 turns; record 2: image: "
    with pytest.raises(InputError) as error:
        read_conversations(file)
    words = str(error.value)
    assert words.startswith(f"{file}: {listed}") and words.endswith("3.png: no such file (and 1 more)")
    first, last = read_conversations(file, skip_unusable=True)
    assert (first.id, last.id) == ("sign", "7")  # a record keeps the number that the file gives it
    assert f"{file}: 6 of 8 records are left out: {listed}" in caplog.text
    with pytest.raises(InputError, match="record 0: conversations: expected"):
        read_conversations(write(tmp_path, [unanswered]), skip_unusable=True)


# ------------------------------------------------------------------------------------------------------------- refusing


def said(*turns: Any, **others: Any) -> dict[str, Any]:
    return {"conversations": list(turns), **others}


Q, A = human("Why?"), gpt("So.")
RECORDS = [
    (["SIGN"], "expected an object, got ['SIGN']"),
    (None, "expected an object, got None"),
    ({}, "conversations: expected a list of what human and gpt say in turn, got no such key"),
    (said(Q, A, id=True), "id: expected text or a whole number, got True"),
    (said(Q, A, id=1.5), "id: expected text or a whole number, got 1.5"),
    (said(Q, A, image=""), "image: expected a picture's name or a list of them, got ''"),
    (said(Q, A, image=3), "image: expected a picture's name or a list of them, got 3"),
    (said(Q, A, image=["a", None]), "image: expected a picture's name or a list of them, got ['a', None]"),
    ({"conversations": "Why?"}, "conversations: expected a list of what human and gpt say in turn, got 'Why?'"),
    (said(), "conversations: expected questions with an answer to each, got 0 turns"),
    (said(A), "conversations: expected questions with an answer to each, got 0 turns"),
    (said(Q), "conversations: expected questions with an answer to each, got 1 turns"),
    (said(Q, Q), "conversations[1].from: expected 'gpt', got 'human'"),
    (said(A, A), "conversations[1].from: expected 'human', got 'gpt'"),
    (said(Q, A, A), "conversations[2].from: expected 'human', got 'gpt'"),
    (said({"from": "system", "value": "Be kind."}, Q, A), "conversations[0].from: expected 'human', got 'system'"),
    (said({"role": "user", "content": "Why?"}, A), "conversations[0].from: expected 'human', got no such key"),
    (said("Why?", A), "conversations[0]: expected an object with \"from\" and \"value\", got 'Why?'"),
    (said(Q, {"from": "gpt"}), "conversations[1].value: expected text, got no such key"),
    (said(Q, gpt(["So."])), "conversations[1].value: expected text, got ['So.']"),
    (said(Q, gpt(" \n")), "conversations[1].value: expected text, got ' \\n'"),
    (said(human("<image>\n"), A, image="a"), "conversations[0].value: expected text, got '<image>\\n'"),
    (said(human("Why\ud800?"), A), "conversations[0].value: expected whole characters, got 'Why\\ud800?'"),
    (said(human("Why?"), gpt("So <image>")), "conversations[1].value: expected an answer without <image>, got 'So <image>'"),
    (said(Q, A, image="a"), "conversations: expected one <image> for each of 1 pictures, got 0"),
    (said(human("<image> Why?"), A), "conversations: expected one <image> for each of 0 pictures, got 1"),
    (said(human("<image> Why?"), A, image=["a", "b"]), "conversations: expected one <image> for each of 2 pictures, got 1"),
    (said(Q, A, families="read"), "families: expected a list of names, got 'read'"),
    (said(Q, A, families=[1]), "families: expected a list of names, got [1]"),
    (said(Q, A, families=[""]), "families: expected a list of names, got ['']"),
    (said(Q, A, families=["read"] * 2), "families: expected one for each of 1 questions, got ['read', 'read']"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "words"), RECORDS, ids=[words[:60] for _, words in RECORDS])
def test_bad_records(tmp_path: Path, record: Any, words: str) -> None:
    """In both layouts the message is the file, the place and what is wrong, and nothing else."""
    lines = write(tmp_path, f"{json.dumps(SIGN)}\n\n{json.dumps(record)}", "data.jsonl")
    for file, place in ((write(tmp_path, [SIGN, SIGN, record]), "record 2"), (lines, "line 3")):
        with pytest.raises(InputError) as error:
            read_conversations(file)
        assert str(error.value) == f"{file}: {place}: {words}"


# Of other projects: where the picture, film or sound is that the words are about.
BLIND: list[tuple[dict[str, Any], str, str]] = [
    ({"video": "v.mp4"}, "What happens?", "video: expected no picture, film or sound that is not under \"image\", got 'v.mp4'"),
    ({"videos": ["v.mp4"]}, "<video>\nWhat happens?", "videos: "),
    ({"video": "v.mp4"}, "<image>\nWhat happens?", "video: "),
    ({"audio": {"path": "a.wav"}}, "What is said?", "audio: "),
    ({"images": ["signs/a.png"]}, "What is it?", "conversations: expected one <image> for each of 1 pictures, got 0"),
    ({"images": [{"path": "signs/a.png"}]}, "<image>\nWhat?", "images: expected a picture's name or a list of them"),
    ({"image": [], "images": ["signs/a.png"]}, "What is it?", "images: "),
    ({"image": None}, "<image>\nWhat is it?", "conversations: expected one <image> for each of 0 pictures, got 1"),
    *[({key: "a.png"}, "What is it?", f"{key}: ") for key in ("img", "Pictures", "image_path", "imageUrl", "photo", "pic_1")],
    ({"num_images": 2, "has_image": True}, "What is it?", "num_images: "),
    ({"image": "signs/a.png", "video": "v.mp4"}, "<image>\nWhat happens next?", "video: "),
    ({"image": "signs/a.png", "images": ["signs/a.png", "b.png"]}, "<image>\nWhich is it?", "images: "),
    ({"image": "signs/a.png"}, "<image>\nIs it in <video>?", "conversations: expected no placeholder but <image>, got '<video>'"),
    *[({}, text, f"conversations: expected no placeholder but <image>, got '{place}'") for text, place in (
        ("<video>\nWhat?", "<video>"), ("What is in <audio>?", "<audio>"), ("Is <image_0> like it?", "<image_0>"),
        ("Picture 1: <img>a.png</img>\nWhat?", "<img>"), ("<Img><ImageHere></Img> What?", "<Img>"), ("<Image> What?", "<Image>"),
        ("<|vision_start|><|image_pad|><|vision_end|>What?", "<|vision_start|>"), ("<vid> What?", "<vid>"),
        ("<image/>What?", "<image/>"), ("<image-placeholder>?", "<image-placeholder>"),
        ("<IMG_CONTEXT>", "<IMG_CONTEXT>"), ("<start_of_image> `x`", "<start_of_image>"),
        ("<im_patch>", "<im_patch>"), ("<image1> and <image2>", "<image1>"), ("<|audio|> What?", "<|audio|>"),
    )],
    ({"system": "Answer in French."}, "Why?", "system: expected none"),
    ({"tools": "[]"}, "Why?", "tools: expected none"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "question", "words"), BLIND, ids=[f"{list(f)} {q}" for f, q, _ in BLIND])
def test_what_is_not_used_is_not_left_out_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fields: dict[str, Any], question: str, words: str
) -> None:
    record = {**fields, "conversations": [human(question), gpt("A dog.")]}
    file = write(tmp_path, [record, SIGN])
    with pytest.raises(InputError) as error:
        read_conversations(file)
    assert str(error.value).startswith(f"{file}: record 0: {words}")
    assert [one.id for one in read_conversations(file, skip_unusable=True)] == ["sign"] and words in caplog.text


def test_what_a_turn_says_besides(tmp_path: Path) -> None:
    for fields, of_gpt, words in (
        ({"image": "signs/a.png"}, False, "conversations[0].image: expected no picture"),
        ({"images": ["a.png"], "weight": 0}, True, "conversations[1].images: expected no picture"),
        ({"video_path": "v.mp4"}, False, "conversations[0].video_path: expected no picture"),
        ({"loss": False}, True, "conversations[1].loss: expected 1, as every answer counts alike, got False"),
        ({"weight": 0.5}, True, "conversations[1].weight: expected 1, as every answer counts alike, got 0.5"),
    ):
        said = [human("Why?"), gpt("So.")]
        said[of_gpt] |= fields
        with pytest.raises(InputError) as error:
            read_conversations(write(tmp_path, [{"conversations": said}]))
        assert f"record 0: {words}" in str(error.value)
    harmless = [
        human("Why?") | {"loss": False, "image": None},
        gpt("So.") | {"loss": True, "weight": 1.0, "images": []},
    ]
    assert len(read_conversations(write(tmp_path, [{"conversations": harmless}]))) == 1


def test_text_about_media_is_text(tmp_path: Path) -> None:
    """LLaVA's own data has tens of thousands of conversations about anything, code among it; answers may hold what they like."""
    questions = [
        'Why is <img src="a.png"> not shown?',
        "What does the <video> tag do in HTML5?",
        "Is `<audio>` old?",
        "Explain <picture> elements.",
        "<div><img></div>",
        "Write Promise<Video> f(List<Image> images)",
        "<video controls></video>",
        "<|im_start|>user",
        "<imagine> a <title>",
    ]
    records = [{"conversations": [human(question), gpt("<video>, <image_0> and <img>")]} for question in questions]
    of_a_picture = {
        "image_id": 7,
        "image_url": "http://example.org/a",
        "num_images": 1,
        "frame": 3,
        "system": "",
        "tools": [],
    }
    assert len(read_conversations(write(tmp_path, [*records, SIGN | of_a_picture]))) == len(questions) + 1
    empty = {
        "video": None,
        "images": [],
        "num_images": 0,
        "img": "",
        "has_image": False,
        "topic": "video",
        "imagination": "x",
    }
    assert read_conversations(write(tmp_path, [{**records[0], **empty}]))[0].images == ()


@pytest.mark.parametrize(
    "text", ["<image" + "0" * 10**5, "<" + " " * 10**5, "<image " * 10**4, "<a " * 10**4 + "<video>"]
)
def test_placeholders_are_found_in_time_proportional_to_the_text(text: str) -> None:
    begun = time.process_time()
    foreign_place(text, False)
    assert time.process_time() - begun < 2


FILES = [
    ("data.json", b"", "data.json: not readable as JSON: Expecting value"),
    ("data.json", b"[{]", "data.json: not readable as JSON: Expecting property name"),
    ("data.json", b"[]", "data.json: expected at least one record, got none"),
    ("data.jsonl", b" \n\n", "data.jsonl: expected at least one record, got none"),
    ("data.json", b'{"data": []}', "data.json: expected a list of records, got {'data': []}"),
    ("data.json", b"{}\n{}", "data.json: not readable as JSON: Extra data: line 2"),
    ("data.jsonl", b"{}}", "data.jsonl: line 1: not readable as JSON: Extra data"),
    ("data.json", b'["\xff"]', "data.json: not readable as text: 'utf-8' codec"),
    ("data.json", b"[" * 200_000, "data.json: not readable as JSON: "),
    ("data.json", b"[" + b"9" * 5000 + b"]", "data.json: not readable as JSON: Exceeds the limit"),
    ("data.json", b'[{"id": 1, "id": 2}]', "JSON: a key is there twice in [('id', 1), ('id', 2)]"),
]


@pytest.mark.parametrize(("name", "content", "words"), FILES, ids=[words for *_, words in FILES])
def test_bad_files(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    with pytest.raises(InputError) as error:
        read_conversations(write(tmp_path, content, name))
    assert str(error.value).startswith(str(tmp_path)) and words in str(error.value)


def test_no_file_and_no_folder(tmp_path: Path) -> None:
    for file, kind in ((tmp_path / "none.json", "nothing"), (tmp_path, "a folder"), ("/dev/zero", "a device")):
        with pytest.raises(InputError) as error:
            read_conversations(file)
        assert str(error.value) == f"{file}: expected a JSON file, found {kind}"
    with pytest.raises(InputError, match="found a name that cannot be used") as error:
        read_conversations("[" * 100_000)
    assert len(str(error.value)) < 300
    with pytest.raises(InputError, match="nowhere: expected a folder with pictures"):
        read_conversations(write(tmp_path, [SIGN]), tmp_path / "nowhere")


def test_messages_stay_short(tmp_path: Path) -> None:
    for record in ("long " * 100_000, [[["deep"]]] * 1000, {"conversations": {str(i): i for i in range(1000)}}):
        with pytest.raises(InputError) as error:
            read_conversations(write(tmp_path, [record]))
        assert len(str(error.value)) < len(str(tmp_path)) + 300


keys = st.sampled_from(["id", "image", "conversations", "families", "from", "value"])
texts = st.sampled_from(["human", "gpt", "system", "<image>", "<image>\nWhy?", "So.", "", "a.png"]) | st.text(
    max_size=5
)
garbage = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys | texts, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def nearly_records(draw: st.DrawFn) -> Any:
    """SIGN with one of its parts, at any depth, exchanged for garbage."""
    record: Any = {"": copy.deepcopy(SIGN)}
    part, key = record, ""
    while isinstance(part[key], list | dict) and draw(st.integers(0, 3)):
        part = part[key]
        key = draw(st.sampled_from(list(part) if isinstance(part, dict) else range(len(part))))
    part[key] = draw(garbage)
    return record[""]


@given(st.lists(garbage | nearly_records(), max_size=3) | garbage)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_gives_conversations_or_an_input_error(tmp_path: Path, content: Any) -> None:
    try:
        found = read_conversations(write(tmp_path, json.dumps(content)))
    except InputError as error:
        assert str(error).startswith(f"{tmp_path}/data.json: ")
        return
    assert len(found) == len(content)
    for one in found:
        for images, question, answer, _ in asked_alone(one):
            assert answer.strip() and build_prompt(question, len(images), "vicuna").text.count("<image>") == len(images)


@given(st.binary(max_size=40), st.sampled_from(["data.json", "data.jsonl"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_give_an_input_error(tmp_path: Path, content: bytes, name: str) -> None:
    with pytest.raises(InputError):  # no 40 bytes are a conversation
        read_conversations(write(tmp_path, content, name))


# --------------------------------------------------------------------------------------------------------- asking alone


def test_turns_asked_alone() -> None:
    turns = (
        Turn("Is <image> like <image>?", "no", "compare"),
        Turn("<image>\nWhat is it?", "a bus"),
        Turn(" Sure?\n", "yes"),
    )
    two = (Path("a"), Path("b"))
    assert list(asked_alone(Conversation("0", two, turns))) == [
        (two, "Is <image> like <image>?", "no", "compare"),
        (two, "What is it?", "a bus", None),
        (two, "Sure?", "yes", None),
    ]
    assert [question for _, question, *_ in asked_alone(Conversation("0", two[:1], turns))] == [
        "Is  like ?",
        "<image>\nWhat is it?",
        "Sure?",
    ]
    assert list(asked_alone(Conversation("0", (), turns[2:]))) == [((), " Sure?\n", "yes", None)]


# ------------------------------------------------------------------------------------- the miniature as such a file


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def draw(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["draw_cards.py", *map(str, arguments)])
    return int(draw_cards.main())


def test_the_miniature_is_read_back_as_it_was_drawn(tmp_path: Path) -> None:
    number = draw_cards.write_json(tmp_path, "train", 8, seed=120)
    drawn = list(islice(cards.scenes("train", 120), 8))
    found = read_conversations(tmp_path / "cards.json")
    assert sum(len(one.turns) for one in found) == number
    assert found[3].images == (tmp_path / "images/000123.png",)
    for scene, one in zip(drawn, found, strict=True):
        assert open_image(one.images[0]).tobytes() == scene.image.tobytes()
        expected = cards.conversation(scene)
        assert (one.id, one.turns) == (expected.id, expected.turns)
        asked = [(q.removeprefix("<image>\n"), answer, family) for _, q, answer, family in asked_alone(one)]
        assert asked == [(q.question, q.answer, q.family) for q in scene.questions]
    sizes = {open_image(one.images[0]).size for one in found}
    assert len(sizes) == 8 and any(width % 14 and height % 14 and width != height for width, height in sizes)


def test_same_seed_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: dict[str, list[Any]] = {"a": [], "b": [], "other seed": ["--seed", 5], "dense": ["--dense"]}
    for name, options in runs.items():
        assert draw(monkeypatch, "--out", tmp_path / name, "--count", 4, "--split", "test", "--seed", 4, *options) == 0
    first = files(tmp_path / "a")
    assert set(first) == {"cards.json", *(f"images/{200_000_004 + i}.png" for i in range(4))}
    assert files(tmp_path / "b") == first
    other, dense = files(tmp_path / "other seed"), files(tmp_path / "dense")
    assert other["cards.json"] != first["cards.json"] and other["images/200000005.png"] == first["images/200000005.png"]
    same = [name for name in first if dense[name] == first[name]]
    assert same == ["images/200000007.png"]  # every fourth is dense anyway


def test_what_it_prints_and_that_it_spares_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "with space"
    assert draw(monkeypatch, "--out", out, "--count", 2) == 0
    shown = capsys.readouterr().out
    number = sum(len(one.turns) for one in read_conversations(out / "cards.json"))
    assert f"cards.json': 2 pictures of the train split, {number} questions" in shown
    assert f"examples/evaluate.py --data '{out}/cards.json'" in shown
    assert f"examples/train.py --data '{out}/cards.json'" in shown

    (out / "notes.txt").write_text("mine")
    before = files(out)
    assert draw(monkeypatch, "--out", out, "--count", 1) == 2
    assert "is not empty; --overwrite" in capsys.readouterr().err and files(out) == before
    assert draw(monkeypatch, "--out", out, "--count", 1, "--overwrite") == 0
    assert len(read_conversations(out / "cards.json")) == 1 and (out / "notes.txt").read_text() == "mine"


def test_a_run_cut_short_leaves_no_file_that_names_other_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert draw(monkeypatch, "--out", tmp_path, "--count", 2) == 0

    def interrupted(scene: cards.Scene) -> Conversation:
        raise KeyboardInterrupt

    monkeypatch.setattr(cards, "conversation", interrupted)
    assert draw(monkeypatch, "--out", tmp_path, "--count", 2, "--dense", "--overwrite") == 130
    assert not (tmp_path / "cards.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--count", 0], "count: expected 1 to"),
        (["--seed", -1], "seed: expected 0 to 99999999"),
        (["--seed", 10**8], "seed: expected 0 to 99999999"),
        (["--seed", 10**8 - 1, "--count", 2], "count: expected 1 to 1 from scene 99999999 on, got 2"),
        (["--out", ROOT / "README.md"], "Not a directory"),
    ],
)
def test_draw_cards_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[Any], words: str
) -> None:
    assert draw(monkeypatch, "--out", tmp_path / "new", "--count", 1, *options) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and words in shown.err and not shown.out
    assert not (tmp_path / "new").exists()


# ----------------------------------------------------------------------------------------------------------- evaluating


def evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    return int(evaluation.main())


def test_the_same_result_from_a_file_as_from_the_cards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    """24 questions, beginning with the file's second record; with --images the file may lie elsewhere."""
    draw_cards.write_json(tmp_path, "test", 4, seed=2)
    moved = tmp_path / "elsewhere.json"
    (tmp_path / "cards.json").rename(moved)
    options = ["--data", moved, "--images", tmp_path, "--seed", 1, "--count", 24, "--json"]
    assert evaluate(monkeypatch, *options) == 0
    got = json.loads(capsys.readouterr().out.splitlines()[-1])

    asked = [
        (scene.image, q.question, q.answer, q.family)
        for scene in islice(cards.scenes("test", 3), 3)
        for q in scene.questions
    ]
    model = minifocus.load(ROOT / "weights/tiny", sampler="focus")
    expected = evaluate_model(model, asked[:24], 8, 24)
    assert {key: value for key, value in got.items() if key not in ("sampler", "samples_per_second")} == {
        key: value for key, value in expected.items() if key != "samples_per_second"
    }
    assert got["count"] == 24 == sum(got["questions"].values()) and got["accuracy"] > 0.6
    assert list(got["families"]) == list(cards.FAMILIES)
    assert got["tokens"]["after_text"] < got["tokens"]["after_vision"] < got["tokens"]["full"]


def test_answers_may_take_as_long_as_the_longest_that_a_file_expects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And 8 tokens more, so that one which begins rightly and goes on is wrong; 16 of the miniature, or what is asked for."""
    answers = ["no", "the card is red " * 10, "yes"]
    turns = [turn for answer in answers for turn in (human("Is it?"), gpt(answer))]
    file = write(tmp_path, [{"conversations": turns}])
    tokenizer = minifocus.load(ROOT / "weights/tiny", "none").tokenizer
    assert tokenizer is not None
    longest = len(tokenizer.encode(answers[1]).ids)
    assert longest > 32
    for options, expected in (
        (["--data", file], longest + 8),
        (["--data", file, "--count", 1], len(tokenizer.encode("no").ids) + 8),
        (["--data", file, "--max-new-tokens", 3], 3),
        (["--count", 1], 16),
    ):
        with mock.patch.object(evaluation, "evaluate", side_effect=InputError("enough")) as asked:
            assert evaluate(monkeypatch, "--sampler", "none", *options) == 2
        assert asked.call_args.kwargs["max_new_tokens"] == expected


class Parrot:
    """Answers with the question's last word, having read as many visual tokens as the question has letters."""

    def generate_batch(self, images: Any, prompts: Any, **options: Any) -> list[Any]:
        if "boom" in prompts:
            raise InputError("prompt: boom")
        self.options = options
        return [
            SimpleNamespace(text=p.split()[-1], tokens=TokenCounts(len(p), len(p) // 2, 2, 1 / len(p))) for p in prompts
        ]


def test_the_accounts() -> None:
    asked = [
        (None, "say red", "red", "zoo"),
        (None, "say red", " red\n", "read"),  # white space at either end does not count
        (None, "say Red", "red", "read"),  # all else does
        (None, "say red.", "red", "zoo"),
        (None, "say no", "no", None),
    ]
    parrot = Parrot()
    result = evaluate_model(parrot, iter(asked), batch=2, template="raw", max_new_tokens=5, families=cards.FAMILIES)
    assert parrot.options == {"template": "raw", "max_new_tokens": 5}
    assert result["count"] == 5 and result["accuracy"] == 3 / 5
    assert list(result["families"].items()) == [("read", 0.5), ("zoo", 0.5)]  # the miniature's first
    assert result["questions"] == {"read": 2, "zoo": 2}
    assert result["intervals"]["zoo"] == wilson(1, 2) and result["interval_95"] == wilson(3, 5)
    assert result["tokens"]["full"] == (7 + 7 + 7 + 8 + 6) / 5
    assert result["tokens"]["after_vision"] == (3 + 3 + 3 + 4 + 3) / 5
    assert result["tokens"]["equivalent"] == pytest.approx((3 / 7 + 1 / 8 + 1 / 6) / 5)
    assert result["samples_per_second"] > 0
    unnamed = evaluate_model(parrot, asked[4:])
    assert unnamed["families"] == {"all": 1.0} and unnamed["questions"] == {"all": 1}
    assert unnamed["intervals"] == {"all": unnamed["interval_95"]}


def test_what_is_asked_of_the_miniature(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    taken = []

    def questions(*arguments: Any) -> Any:
        taken.append(arguments)
        return iter([(None, "say red", "red", "read"), (None, "say no", "yes", "relate")])

    monkeypatch.setattr(cards, "questions", questions)
    loaded = mock.Mock(return_value=Parrot())
    monkeypatch.setattr(minifocus, "load", loaded)
    assert evaluate(monkeypatch, "--json", "--dtype", "bfloat16") == 0
    assert loaded.call_args.args[2:] == ("cpu", "bfloat16")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["families"] == {"read": 1.0, "relate": 0.0}
    assert evaluate(monkeypatch, "--dense", "--seed", 7, "--count", 5, "--split", "validation") == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in shown[1:4]] == [["read", "100.0%"], ["relate", "0.0%"], ["all", "50.0%"]]
    assert taken == [("test", 1000, 0, None), ("validation", 5, 7, True)]


def test_an_error_names_the_questions() -> None:
    with pytest.raises(InputError, match="^questions 3 to 4: prompt: boom$"):
        evaluate_model(Parrot(), [(None, q, "red", None) for q in ("a", "b", "c", "boom", "d")], batch=2)
    with pytest.raises(InputError, match="expected at least one, got none"):
        evaluate_model(Parrot(), [])


@pytest.mark.parametrize(
    ("right", "asked", "interval"),
    [  # the first four: Newcombe 1998 (Statistics in Medicine 17), Table I, method 3
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        (20, 20, (0.8389, 1.0)),
        (0, 1, (0.0, 0.7935)),
    ],
)
def test_wilson_intervals(right: int, asked: int, interval: tuple[float, float]) -> None:
    low, high = wilson(right, asked)
    assert (low, high) == pytest.approx(interval, abs=5e-5)


def test_wilson_intervals_hold_the_share_and_end_at_0_and_1() -> None:
    for asked in range(1, 60):
        intervals = [wilson(right, asked) for right in range(asked + 1)]
        assert all(0 <= low <= right / asked <= high <= 1 for right, (low, high) in enumerate(intervals))
        assert intervals[0][0] == 0 and intervals[-1][1] == 1


BAD_ARGUMENTS = [
    (["--batch", 0], "--batch: expected a number of at least 1, got 0"),
    (["--max-new-tokens", 0], "--max-new-tokens: expected a number of at least 1, got 0"),
    (["--seed", -1], "--seed: expected a number of at least 0, got -1"),
    (["--seed", 10**8], "seed: expected 0 to 99999999"),
    (["--count", -5], "--count: expected a number of at least 1, got -5"),
    (["--images", "."], "--images is of no use without --data"),
    (["--images-anywhere"], "--images-anywhere is of no use without --data"),
    (["--data", "none.json"], "none.json: expected a JSON file, found nothing"),
    (["--data", "{data}", "--template", "vicuna"], "record 0: image: expected a name inside of {folder}"),
    (["--data", "{data}", "--dense"], "--split and --dense are of the miniature"),
    (["--data", "{data}", "--split", "test"], "--split and --dense are of the miniature"),
    (["--data", "{data}", "--images", "none"], "none: expected a folder with pictures"),
    (["--data", "{data}", "--seed", 1], "data.json has no record 1"),
    (["--data", "{data}"], "questions 1 to 2: {folder}/signs/a.png: not a picture that can be read"),
    (["--data", "{data}", "--template", "raw", "--images-anywhere"], "questions 1 to 2: prompt: expected one <image>"),
]


@pytest.mark.parametrize(("options", "words"), BAD_ARGUMENTS, ids=[words for _, words in BAD_ARGUMENTS])
def test_evaluate_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[Any], words: str
) -> None:
    record = copy.deepcopy(SIGN)
    if "--template" in options:  # about a picture that is elsewhere; without a place for it, its second turn is refused
        record["image"] = str(ROOT / "examples/cards.png")
    data = write(tmp_path, [record])
    assert evaluate(monkeypatch, *(str(option).format(data=data) for option in options)) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and words.format(folder=tmp_path) in shown.err and not shown.out
