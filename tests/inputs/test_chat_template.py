"""The folder's own chat template: found, rendered, asked in and trained on as transformers does, whatever it tries."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import LLAVA, PICTURES, TEMPLATED, WORDS, each
from checkpoints import IMAGE_TOKEN, add_chat_tokenizer, build, save
from PIL import Image
from transformers import AutoProcessor
from transformers.utils.chat_template_utils import render_jinja_template

import minifocus
from minifocus.inputs import chat_template
from minifocus.inputs import prompt as prompts
from minifocus.inputs.chat_template import ChatTemplate, read_chat_template
from minifocus.inputs.conversations import Conversation, Turn
from minifocus.inputs.prompt import TEMPLATES, build_conversation, build_prompt
from minifocus.inputs.template_writer import Frame
from minifocus.training.examples import NO_LABEL, encode

TINY = Path(__file__).resolve().parents[2] / "weights/tiny"


QUESTIONS = ("What is it?", " Why [is]\n it ", "A", "USER", "x <image> y<image>\nz", "<image>\n<image>\nWhat?")
TURNS = (("What is it?", "a cat", 1), ("And these?", "So. ASSISTANT: no", 2), ("Why", "x y", 0))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without a template."""
    folder = save(build("llava", text_vocab_size=128), tmp_path_factory.mktemp("chat"))
    add_chat_tokenizer(folder)
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    preprocessor = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True, **size}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    counts = {"patch_size": 7, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "LlavaProcessor", "image_token": "<image>", **counts})
    )
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "model"))


def templated(folder: Path, template: str) -> minifocus.Llava:
    (folder / "chat_template.jinja").write_text(template)
    return minifocus.load(folder, "none")


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8))


def content(question: str, images: list[Image.Image], as_text: bool) -> Any:
    """As a user of transformers passes a question: its pictures first, or where it has places for them, there."""
    if as_text:
        return question if "<image>" in question else "<image>\n" * len(images) + question
    parts: list[Any] = [{"type": "image", "image": image} for image in images]
    if "<image>" not in question:
        return [*parts, {"type": "text", "text": question}]
    pieces = question.replace("<image>\n", "<image>").split("<image>")
    placed = [{"type": "text", "text": pieces[0]}]
    for image, piece in zip(parts, pieces[1:], strict=True):
        placed += [image, {"type": "text", "text": piece}]
    return [part for part in placed if part.get("text") != ""]


def tokens(processor: Any, messages: list[Any], images: list[Image.Image], **options: Any) -> list[int]:
    """Of messages by transformers."""
    if isinstance(messages[0]["content"], list):
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    else:  # the pictures are not in the messages
        given = {"processor_kwargs": {"images": images}} if images else {}
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, **given, **options)
    return list(inputs["input_ids"][0])


@pytest.mark.parametrize("name", TEMPLATED)
def test_tokens_are_transformers(folder: Path, name: str) -> None:
    """For one picture, several and none, at the places of one's own, and for several turns; and the user's words are found."""
    model = templated(folder, TEMPLATED[name])
    assert model.tokenizer is not None
    processor = AutoProcessor.from_pretrained(folder)
    as_text = name == "a language model's"
    for number in (0, 1, 2, 3):
        images = [picture(seed) for seed in range(number)]
        for question in QUESTIONS:
            if question.count("<image>") not in (0, number):
                continue
            message = {"role": "user", "content": content(question, images, as_text)}
            theirs = tokens(processor, [message], images, add_generation_prompt=True)
            ours = model.processor(images, question)
            assert ours.input_ids.tolist() == theirs, (number, question)
            words = model.tokenizer.decode(ours.input_ids[ours.instruction].tolist())
            letters = "".join(question.replace("<image>", "").split())
            assert "".join(words.split()) == letters and words == words.strip(), (number, question)

    images, messages = [picture(seed) for seed in range(3)], []
    for question, answer, number in TURNS:
        mine = images[: number - 3 or 3] if number == 1 else images[1 : 1 + number]
        messages += [{"role": "user", "content": content(question, mine, as_text)}]
        said = answer if as_text else [{"type": "text", "text": answer}]
        messages += [{"role": "assistant", "content": said}]
    theirs = tokens(processor, messages, images)
    turns = tuple(Turn("<image>\n" * number + question, answer) for question, answer, number in TURNS)
    example = encode(model.processor, Conversation("c", tuple(images), turns))
    if name in ("llava-1.5, bakLLaVA", "TinyLLaVA"):  # nothing ends an answer there: </s> does, in place of white space
        space = processor.tokenizer.convert_tokens_to_ids("\n" if name == "TinyLLaVA" else " ")
        ends = [i for i, token in enumerate(example.input_ids.tolist()) if token == 2]
        assert len(ends) == 3 and all(theirs[i] == space for i in ends)
        theirs = [2 if i in ends else token for i, token in enumerate(theirs)]
    assert example.input_ids.tolist() == theirs
    prompt = tokens(processor, messages[:1], images[:1], add_generation_prompt=True)
    assert (example.labels != NO_LABEL).tolist().index(True) == len(prompt)
    for number, (question, answer, _) in enumerate(TURNS):
        mine = example.turn == number
        learned = example.labels[mine & (example.labels != NO_LABEL)].tolist()
        assert processor.tokenizer.decode(learned[:-1]).strip() == answer
        assert model.tokenizer.token(learned[-1]) in ("</s>", "<|eot_id|>", "<|im_end|>")
        assert processor.tokenizer.decode(example.input_ids[mine & example.instruction]) == question


def test_the_language_is_transformers() -> None:
    """Its settings, names and filters: what templates use beyond those above."""
    template = (
        "  {% if tools is none and documents is none and not tools %}\n  yes\n  {% endif %}\n"
        "{% set ns = namespace(a=1, n='é') %}{% for m in messages %}{% if loop.last %}{% break %}{% endif %}"
        "{% set ns.a = ns.a + 1 %}{{ m | tojson }}{{ m | tojson(indent=2) }}{{ {'b': '<é>', 'a': 1} | tojson(sort_keys=True) }}"
        "{% generation %}{% set ns.n = 'in' %}{{ loop.index }}{% endgeneration %}{% endfor %}{{ ns.a }}{{ ns.n }}"
        "{{ dict(a=1).items() | list }}{{ dict.fromkeys(['a'], 2) }}{{ strftime_now('%Y') }}{{ bos_token }}{{ unk_token }}"
        "{{ ('one two ' * 9) | wordwrap(20) }}{{ '%s|%5d' | format('x', 3) }}{{ '{:>4}'.format('é') }}{{ '\\n' }}\\n"
        "{{ messages[0]['content'][0]['text'] | title | replace('H', 'J') }}{{ messages | map(attribute='role') | join }}"
        "{% macro f(x, y='z') -%} {{ x ~ y }} {%- endmacro %}{{ f('a') }}{% raw %}{{ no }}{% endraw %}"
        "{{ add_generation_prompt }}\n"
    )
    messages = [
        {"role": role, "content": [{"type": "text", "text": "hé 'ho'"}]} for role in ("user", "assistant", "user")
    ]
    special = {"bos_token": "<s>"}
    theirs, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **special)
    assert ChatTemplate("", template, tuple(special.items())).render(messages, True) == theirs[0]


@pytest.mark.parametrize("name", ["llama-3, with BOS and trim", "llava-1.5, bakLLaVA"])
def test_a_tokenizer_that_ends_texts_itself(folder: Path, name: str) -> None:
    """Its </s> stays out of a text that has a BOS of its own, as its BOS does."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    tokenizer["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    file.write_text(json.dumps(tokenizer))
    model = templated(folder, TEMPLATED[name])
    message = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    theirs = tokens(AutoProcessor.from_pretrained(folder), [message], [], add_generation_prompt=True)
    assert model.processor(None, "Hi").input_ids.tolist() == theirs
    assert theirs.count(1) == 1 and theirs.count(2) == (name != "llama-3, with BOS and trim")


def test_independent_turns(folder: Path) -> None:
    """Each is the folder's prompt of its own and the answer; the pictures, which they share, are in front of the questions."""
    model = templated(folder, TEMPLATED["llava-1.6-34b"])
    images = (picture(0), picture(1))
    turns = tuple(Turn("<image>\n" * n + question, answer) for question, answer, n in (*TURNS[1:], ("Who?", "I", 0)))
    example = encode(model.processor, Conversation("c", images, turns), independent=True)
    for number, turn in enumerate(turns):
        question = turn.question.replace("<image>\n", "")
        mine = (example.turn < 0) | (example.turn == number)
        prompt = model.processor(images, question).input_ids.tolist()
        assert example.input_ids[mine].tolist()[: len(prompt)] == prompt
        assert int((example.labels[mine] == NO_LABEL).sum()) >= len(prompt)
    assert int((example.input_ids == IMAGE_TOKEN).sum()) == 32
    last = templated(folder, "{% for m in messages %}{{ m.role }}: " + WORDS + PICTURES + "{% endfor %}")
    with pytest.raises(minifocus.InputError, match="template: expected one with the pictures in front"):
        encode(last.processor, Conversation("c", images, turns), independent=True)


def test_a_model_of_the_folder_is_asked_as_before(tmp_path: Path) -> None:
    """The embedded model's own template is what it was asked in, and trained in, by name."""
    own = minifocus.load(TINY, "none").template
    assert isinstance(own, ChatTemplate)
    for question, number in (("Hi?", 0), (" Hi?\n", 1), ("<image>\nHi?", 1), ("Hi?", 3)):
        assert build_prompt(question, number, own) == build_prompt(question, number, "vicuna")
    turns = [("<image>\nA", 1, "b"), ("B", 0, "c d")]
    named = build_conversation(turns, "vicuna", ["</s>"], "</s>")
    assert build_conversation(turns, own, ["</s>"], "</s>") == named


# -------------------------------------------------------------------------------------------------- where it comes from


def write_sources(folder: Path, names: tuple[str, ...]) -> None:
    processor = json.loads((folder / "processor_config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    for name in names:
        if name == "processor":
            processor["chat_template"] = name
        elif name == "legacy":
            (folder / "chat_template.json").write_text(json.dumps({"chat_template": name}))
        elif name == "jinja":
            (folder / "chat_template.jinja").write_bytes(b"jinja\r\n.")
        elif name in ("default", "tools"):
            (folder / "additional_chat_templates").mkdir(exist_ok=True)
            (folder / f"additional_chat_templates/{name}.jinja").write_text(name)
        elif name == "tokenizer":
            tokenizer["chat_template"] = name
        else:
            tokenizer["chat_template"] = [{"name": "tools", "template": "no"}, {"name": "default", "template": name}]
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


SOURCES = ("processor", "legacy", "jinja", "default", "tools", "tokenizer", "named")


@pytest.mark.parametrize("names", [pair for n in (0, 1, 2) for pair in combinations(SOURCES, n)])
def test_sources(folder: Path, names: tuple[str, ...]) -> None:
    """Of two that disagree, the one that transformers' processor takes, or else its tokenizer."""
    write_sources(folder, names)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    text: str | None = None
    try:
        processor = AutoProcessor.from_pretrained(folder)
        text = processor._resolve_chat_template(None) if processor.chat_template else None
        if text is None and processor.tokenizer.chat_template:
            text = processor.tokenizer.get_chat_template()
    except ValueError:
        with pytest.raises(minifocus.CheckpointError, match="additional_chat_templates"):
            found = read_chat_template(folder, ())
            assert found is not None
            found.render([], True)
        return
    found = read_chat_template(folder, ())
    assert (found and found.source) == text


@pytest.mark.parametrize(
    ("file", "written", "words"),
    [
        ("chat_template.jinja", b"\xff", "chat_template.jinja: not readable as text in UTF-8"),
        ("chat_template.jinja", b"a" * (2**20 + 1), "chat_template.jinja: expected at most 1048576 bytes"),
        ("chat_template.json", b"{", "chat_template.json: not readable as JSON"),
        ("chat_template.json", b"{}", r"chat_template.json: expected the key chat_template, found \[\]"),
        (
            "chat_template.json",
            b'{"chat_template": 5}',
            "chat_template.json: chat_template: expected .* as text, got 5",
        ),
        (
            "tokenizer_config.json",
            b'{"chat_template": [{"name": "a"}]}',
            "chat_template: expected templates with their",
        ),
        ("processor_config.json", b'{"chat_template": ["a"]}', "processor_config.json: chat_template: expected a chat"),
    ],
)
def test_files_that_are_none(folder: Path, file: str, written: bytes, words: str) -> None:
    (folder / file).write_bytes(written)
    with pytest.raises(minifocus.CheckpointError, match=words):
        minifocus.load(folder, "none")


def test_a_file_that_would_never_end(folder: Path) -> None:
    os.mkfifo(folder / "chat_template.jinja")
    with pytest.raises(minifocus.CheckpointError, match=r"chat_template.jinja: expected a file, found a FIFO"):
        minifocus.load(folder, "none")


def test_a_folder_without_one(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log has the guess once; none where a template is named."""
    with caplog.at_level(logging.WARNING, "minifocus"):
        model = minifocus.load(folder, "none")
        model.generate(None, "Hi", max_new_tokens=1, template="vicuna")
        assert not caplog.messages
        for _ in range(2):
            model.generate(None, "Hi", max_new_tokens=1)
        (said,) = caplog.messages
        assert str(folder) in said and "no chat template" in said and "'llama3'" in said
        assert templated(folder, LLAVA).processor.prompt_template() != "llama3"
        assert len(caplog.messages) == 1


# -------------------------------------------------------------------------------------------------- what it tries


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("a\n{% for %}", "chat_template.jinja: line 2: not a chat template that can be read"),
        ("{{ raise_exception('no ' * 9999) }}", "prompt: the chat template of .* refuses it: no no .{,600}$"),
        ("{{ messages[0].content[0].nothing.at_all }}", "chat template fails: .* has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "chat template fails: ZeroDivisionError"),
        ("Hello.", "expected a chat template that writes the question"),
        ("{{ '<image>\n' ~ messages[0].content }}", "expected a chat template that writes the question"),
        ("{% for m in messages %}" + WORDS + "{% endfor %}", "has 0 places for pictures, expected 1"),
        ("{{ '<image>' + messages[0].content[-1].text }}", "has 1 places for pictures, expected 2"),
        (PICTURES.replace("m[", "messages[0][") + "{{ messages[0].content[-1].text }}", "leaves out words"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more time or memory"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 10 ** 10 }}", "MiB of memory"),
        ("{{ '%999999999d' % 1 }}{{ 'a'.center(10 ** 9) }}", "MiB of memory"),
        (
            "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            "MiB of memory",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'a' * 10 ** 7 * 2 }}", "a text of 20000000 characters"),
        ("{% include '/etc/passwd' %}", "fails"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ namespace(__init__=1) }}{{ cycler.__init__.__globals__.os.system('true') }}", "no place for '__init__'"),
        ("{{ messages.append(messages) }}", "unsafe"),
    ],
)
def test_what_it_tries(folder: Path, template: str, words: str) -> None:
    """One error, soon, and the next template is rendered as if nothing had been."""
    model = templated(folder, template)
    question, images = ("x <image> y <image>", [picture(0)] * 2)
    if "places for pictures" in words:
        question, images = "x", images[: int(words[-1])]
    began = time.process_time(), time.monotonic()
    with pytest.raises((minifocus.CheckpointError, minifocus.InputError), match=words) as error:
        model.generate(images, question)
    assert len(str(error.value)) < 1500 and time.process_time() - began[0] < 2 and time.monotonic() - began[1] < 60
    assert len(model.processor(images, question, "vicuna").input_ids)  # a named one stands in for it
    assert ChatTemplate("", "{{ bos_token }}{{ messages | length }}", (("bos_token", "b"),)).render([], False) == "b0"


def test_the_process_cannot_open_anything() -> None:
    assert ChatTemplate("", "a", ()).render([], False) == "a"
    process = chat_template._renderer._process
    assert process is not None
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    for name, most in (("open files", 3), ("file size", 0), ("processes", 0), ("address space", 2**29)):
        assert any(line.startswith(f"Max {name} ") and f" {most} " in line for line in limits.splitlines()), name


def test_words_that_a_template_changes(folder: Path) -> None:
    """The span is then what it made of them; where that cannot be told, all after the picture. Training refuses."""
    start = "{% for m in messages %}Q: " + PICTURES
    model = templated(folder, start + each("text", "{{ c['text'] | upper | replace('I', '1') }}") + " ;{% endfor %}")
    assert isinstance(model.template, ChatTemplate)
    prompt = build_prompt(" Is it?", 1, model.template)
    assert prompt.text[slice(*prompt.instruction)] == "1S 1T?"
    conversation = Conversation("c", (), (Turn("Is it?", "a"),))
    with pytest.raises(minifocus.InputError, match="template: .* changes a conversation's words"):
        encode(model.processor, conversation)
    # What stands around the words may change while a process lives, as a date does.
    frames = prompts._known_writer(model.template).frames
    frames |= dict.fromkeys(frames, Frame(["yesterday", ""], []))
    assert build_prompt(" Is it?", 1, model.template) == prompt
    model = templated(folder, start + WORDS + "{{ strftime_now(' %f') }}!{% endfor %}")
    prompt = build_prompt("Is it?", 1, model.template)
    assert prompt.text[slice(*prompt.instruction)] == prompt.text.removeprefix("Q: <image>\n")
    asks = "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|im_start|>bot\n{% endif %}"
    model = templated(
        folder, "{% for m in messages %}" + WORDS + "{% if loop.first %}" + asks + "{% endif %}{% endfor %}"
    )
    with pytest.raises(minifocus.InputError, match="template: .* a prompt that a conversation does not go on from"):
        encode(model.processor, conversation)


def in_a_fork(number: int) -> tuple[int | None, str]:
    text = ChatTemplate("", "{{ messages[0] }}", ()).render([str(number)], False)  # type: ignore[list-item]
    assert chat_template._renderer._process is not None
    return chat_template._renderer._process.pid, text


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_threads_and_forks() -> None:
    """Threads share the process, a fork gets its own; each caller has its own reply."""
    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(in_a_fork, range(100)))
    assert [text for _, text in replies] == [str(n) for n in range(100)] and len({pid for pid, _ in replies}) == 1
    with chat_template._renderer._lock:  # as if another thread were waiting for its reply
        pool = multiprocessing.get_context("fork").Pool(2)
    with pool:
        forked = pool.map_async(in_a_fork, range(20), chunksize=10).get(timeout=60)
    assert [text for _, text in forked] == [str(n) for n in range(20)]
    assert replies[0][0] not in {pid for pid, _ in forked}
    assert in_a_fork(7) == (replies[0][0], "7")


def test_every_name_is_still_taken(folder: Path) -> None:
    model = templated(folder, "{{ 1 / 0 }}")
    for name in TEMPLATES:
        assert model.generate(None, "Hi", max_new_tokens=1, template=name).token_ids
