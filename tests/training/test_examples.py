"""Conversations as tokens of every template, and the order in which a run sees them."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import IMAGE_TOKEN, add_chat_tokenizer, build, save
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from random_examples import END

import minifocus
from minifocus.cards import CardScenes
from minifocus.inputs.conversations import Conversation, Turn, asked_alone
from minifocus.inputs.prompt import TEMPLATES, build_prompt
from minifocus.inputs.template_writer import IMAGE
from minifocus.training.examples import NO_LABEL, Batches, UnusableConversation, collate, encode
from minifocus.training.packed import Guidance, forward

TINY = Path(__file__).resolve().parents[2] / "weights/tiny"

pytestmark = pytest.mark.usefixtures("one_thread")


def test_examples_follow_from_seed_and_position() -> None:
    """Micro-batches of other sizes hold the same examples in the same order; an epoch is a permutation."""
    model = minifocus.load(TINY, "none")
    source = [Conversation(str(i), (), tuple(Turn(f"{i} {t}", "yes") for t in range(3))) for i in range(7)]

    def order(size: int, count: int, **options: Any) -> list[Conversation]:
        batches = Batches(model.processor, source, size, **{"seed": 5, **options})
        return [batches.conversation(i * size + j) for i in range(count // size) for j in range(size)]

    drawn = order(1, 14, max_turns=2, independent=True)
    assert drawn == order(7, 14, max_turns=2, independent=True)
    for epoch in (drawn[:7], drawn[7:]):
        assert sorted(c.id for c in epoch) == [str(i) for i in range(7)]
        assert all(len(c.turns) == 2 and {t.question.split()[0] for t in c.turns} == {c.id} for c in epoch)
    assert [c.id for c in drawn[:7]] != [c.id for c in drawn[7:]] != [str(i) for i in range(7)]
    assert len({c.turns[0].question.split()[1] for c in drawn}) == 3  # independent turns are shuffled
    assert all([t.question.split()[1] for t in c.turns] == ["0", "1"] for c in order(1, 7, max_turns=2))  # others not
    assert [c.id for c in order(1, 14, shuffle=False)] == [str(i) for i in range(7)] * 2
    assert [c.id for c in order(1, 7)] != [c.id for c in order(1, 7, seed=6)]
    batch = Batches(model.processor, source, 3, 5)[4]
    assert batch.position == 12 and len(batch.input_ids) == 3
    with pytest.raises(minifocus.InputError, match="data: expected at least one conversation"):
        Batches(model.processor, [], 1, 0)


def test_the_next_conversation_takes_the_place_of_one_that_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = minifocus.load(TINY, "none")
    words = ["stars", "circles", "squares", "triangles"]
    torn = tmp_path / "torn.png"
    torn.write_bytes(b"no picture")
    source = [Conversation(word, (), (Turn(f"How many {word}?", "two"),)) for word in words]
    source.insert(1, Conversation("torn", (torn,), (Turn("<image> What is it?", "one"),)))
    source.insert(2, Conversation("long", (), (Turn("7 " * 5000, "one"),)))

    def read(count: int, **options: Any) -> list[str]:
        batches = Batches(model.processor, source, 1, 5, skip_unusable=True, **options)
        assert model.tokenizer is not None
        texts = [model.tokenizer.decode(batches[i].input_ids[0].tolist()) for i in range(count)]
        return [next(word for word in words if word in text) for text in texts]

    assert read(7, shuffle=False) == ["stars", "circles", "circles", *words[1:], "stars"]
    for name, why in (("torn", "torn.png: not a picture"), ("long", "its first turn takes ")):
        assert f"left out: conversation '{name}': " in caplog.text and why in caplog.text
    caplog.clear()
    shuffled = read(12)
    assert shuffled == read(12) and shuffled[:6] != shuffled[6:] and len(set(shuffled[:6])) == 4
    batches = Batches(model.processor, source, 2, 5, shuffle=False)
    with pytest.raises(UnusableConversation, match=r"'torn': .*torn.png: not a .* \(skip_unusable leaves such"):
        batches[0]
    # A fault of the whole is none of a conversation.
    with pytest.raises(
        minifocus.InputError, match="data: expected a usable conversation, got 2 that are not, one after"
    ):
        Batches(model.processor, source[1:3], 1, 0, skip_unusable=True)[0]


ENDS = {"vicuna": "</s>", "vicuna_v1": "</s>", "mistral": "</s>", "llama3": "<|eot_id|>", "chatml": "<|im_end|>"}
FORMS = {  # a first turn with the pictures in front, and a later one: (before the question, between, after the answer)
    "vicuna": ("USER: ", " ASSISTANT: ", "</s>", ""),
    "vicuna_v1": ("USER: ", " ASSISTANT: ", "</s>", TEMPLATES["vicuna_v1"].split("USER")[0]),
    "mistral": ("[INST] ", " [/INST] ", "</s>", ""),
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        "",
    ),
    "chatml": (
        "<|im_start|>user\n",
        "<|im_end|><|im_start|>assistant\n",
        "<|im_end|>",
        "<|im_start|>system\nAnswer the questions.<|im_end|>",
    ),
}


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def chat_model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> minifocus.Llava:
    """A random model whose tokenizer knows every printable character and the templates' own tokens."""
    folder = save(build(request.param, seed=1, text_vocab_size=128), tmp_path_factory.mktemp("chat"))
    add_chat_tokenizer(folder)
    return minifocus.load(folder, "none")


@pytest.fixture(params=list(FORMS))
def model(request: Any, chat_model: minifocus.Llava, monkeypatch: pytest.MonkeyPatch) -> minifocus.Llava:
    monkeypatch.setattr(chat_model, "template", request.param)
    return chat_model


def picture(width: int = 70, height: int = 50) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8))


PICTURES = (picture(), picture(30, 90))
TURNS = (Turn("<image>\nWhat is it?", "a cat"), Turn("And [this]: <image>, too?", " no\n"), Turn("Why?", "So. It is"))


def as_ids(model: minifocus.Llava, text: str, images: Sequence[Image.Image]) -> list[int]:
    """`text` with each place filled, as the tokenizer reads it at one go."""
    assert model.tokenizer is not None and model.image_processor is not None
    counts = iter([model.num_visual_tokens(model.image_processor(image)[1]) for image in images])
    ids: list[int] = []
    for token in model.tokenizer.encode(text).ids:
        ids += [token] * (next(counts) if token == IMAGE_TOKEN else 1)
    return ids


def asked(model: minifocus.Llava, images: Sequence[Image.Image], question: str) -> tuple[list[int], list[bool]]:
    """What generation feeds the model."""
    prepared = model.processor(list(images), question)
    return prepared.input_ids.tolist(), prepared.instruction.tolist()


def end_id(model: minifocus.Llava) -> int:
    assert model.tokenizer is not None
    token = model.tokenizer.token_id(ENDS[model.template])
    assert token is not None
    return token


def answer_ids(model: minifocus.Llava, answer: str) -> list[int]:
    """Of character tokens, with the space that some templates put in front."""
    assert model.tokenizer is not None
    space = " " if model.template in ("vicuna", "vicuna_v1", "mistral") else ""
    return [*model.tokenizer.encode(space + answer.strip()).ids[1:], end_id(model)]


@pytest.mark.parametrize("images", [1, 2, 0])
def test_a_turn_is_the_prompt_that_generation_feeds_and_its_answer(model: minifocus.Llava, images: int) -> None:
    for question in (
        "What is it?",
        " Is <image> it, or\n <image> ? ",
        "<image>\n<image>\nWhere [is] it",
        "<image> Is it?",
    ):
        if question.count(IMAGE) not in (0, images):
            continue
        question = question if IMAGE in question or not images else f"{IMAGE}\n" * images + question
        conversation = Conversation("c", PICTURES[:images], (Turn(question, "a cat "),))
        example = encode(model.processor, conversation)
        ids, instruction = asked(model, PICTURES[:images], question)
        answer = answer_ids(model, "a cat")
        assert example.input_ids.tolist() == ids + answer
        assert example.instruction.tolist() == instruction + [False] * len(answer)
        assert example.labels.tolist() == [NO_LABEL] * len(ids) + answer
        assert set(example.turn.tolist()) == {0}
        assert len(example.tiles) == len(example.sizes) == images
        counts = [model.num_visual_tokens(size) for size in example.sizes]
        assert int((example.input_ids == IMAGE_TOKEN).sum()) == sum(counts)
        assert [len(tiles) for tiles in example.tiles] == [model.num_tiles(size) for size in example.sizes]


def test_chat_turns_follow_one_another(model: minifocus.Llava) -> None:
    """The whole text at one go; the user's words, and no others, guide; the answers, and no others, are learned."""
    before, between, after, system = FORMS[model.template]
    text, spans, answers = system, [], []
    for turn in TURNS:
        text += before
        words = turn.question.removeprefix("<image>\n")
        begin = len(text) + len(turn.question) - len(words)
        spans.append((begin, begin + len(words)))
        text += turn.question + between
        begin = len(text) - (model.template in ("vicuna", "vicuna_v1", "mistral"))
        text += turn.answer.strip() + after
        answers.append((begin, len(text)))
    assert model.tokenizer is not None and model.image_processor is not None
    counts = iter([model.num_visual_tokens(model.image_processor(image)[1]) for image in PICTURES])
    encoded = model.tokenizer.encode(text)
    example = encode(model.processor, Conversation("c", PICTURES, TURNS))
    expected = []
    for token, (first, last) in zip(encoded.ids, encoded.offsets, strict=True):
        turn = sum(first >= end for _, end in answers)
        in_words = any(begin <= first < last <= end for begin, end in spans)
        in_answer = any(begin <= first < last <= end for begin, end in answers)
        one = (token, turn, in_words and token != IMAGE_TOKEN, token if in_answer else NO_LABEL)
        expected += [one] * (next(counts) if token == IMAGE_TOKEN else 1)
    columns = (example.input_ids, example.turn, example.instruction, example.labels)
    assert list(zip(*(c.tolist() for c in columns), strict=True)) == expected
    assert len(example.tiles) == 2
    assert text[slice(*spans[1])] == "And [this]: <image>, too?" and text[slice(*answers[0])].strip().startswith(
        "a cat"
    )


@pytest.mark.parametrize("images", [2, 0])
def test_independent_turns_share_what_is_in_front_of_the_questions(model: minifocus.Llava, images: int) -> None:
    """The shared part and a turn's own are the prompt of that turn alone, and the pictures are in it once."""
    turns = TURNS if images else tuple(Turn(t.question.replace("<image>", "it"), t.answer) for t in TURNS)
    conversation = Conversation("c", PICTURES[:images], turns)
    example = encode(model.processor, conversation, independent=True)
    for number, (pictures, question, answer, _) in enumerate(asked_alone(conversation)):
        question = question.replace(IMAGE, "").strip()
        mine = (example.turn < 0) | (example.turn == number)
        ids, instruction = asked(model, pictures, question)  # type: ignore[arg-type]
        ending = answer_ids(model, answer)
        assert example.input_ids[mine].tolist() == ids + ending
        assert example.instruction[mine].tolist() == instruction + [False] * len(ending)
        assert example.labels[mine].tolist() == [NO_LABEL] * len(ids) + ending
    assert example.turn.tolist() == sorted(example.turn.tolist())
    counts = [model.num_visual_tokens(size) for size in example.sizes]
    placeholders = example.input_ids == IMAGE_TOKEN
    assert int(placeholders.sum()) == sum(counts) and not bool((placeholders & (example.turn >= 0)).any())
    assert len(example.tiles) == images


@pytest.mark.parametrize("independent", [False, True])
def test_turns_that_do_not_fit_are_left_out_whole(model: minifocus.Llava, independent: bool) -> None:
    conversation = Conversation("the second", PICTURES, TURNS)
    wholes = [encode(model.processor, replace(conversation, turns=TURNS[:n]), independent) for n in (1, 2, 3)]
    lengths = [len(example.input_ids) for example in wholes]
    for limit, turns in ((lengths[2], 3), (lengths[2] - 1, 2), (lengths[1], 2), (lengths[1] - 1, 1), (lengths[0], 1)):
        example = encode(model.processor, conversation, independent, limit)
        expected = wholes[turns - 1]
        for name in ("input_ids", "turn", "instruction", "labels"):
            assert torch.equal(getattr(example, name), getattr(expected, name)), name
        assert example.sizes == expected.sizes == ([(50, 70), (90, 30)][: 2 if independent or turns > 1 else 1])
        forward(model, collate([example]), Guidance.none(1), independent)  # its pictures are as many as its places
    labelled = int((wholes[0].labels == NO_LABEL).sum())  # what stands before the first answer
    for limit in (lengths[0] - 1, labelled + 1):  # the first turn is cut off in its answer
        cut = encode(model.processor, conversation, independent, limit)
        for name in ("input_ids", "turn", "instruction", "labels"):
            assert torch.equal(getattr(cut, name), getattr(wholes[0], name)[:limit]), name
        assert cut.sizes == wholes[0].sizes
    with pytest.raises(
        UnusableConversation, match=rf"'the second': .* takes {lengths[0]} tokens; .* begin within {labelled}$"
    ):
        encode(model.processor, conversation, independent, labelled)
    limit = model.config.text.max_position_embeddings
    with pytest.raises(UnusableConversation, match=rf"'c': its first turn takes \d+ tokens; .* begin within {limit}$"):
        encode(model.processor, Conversation("c", (), (Turn("a" * limit, "b"),)), independent, 10 * limit)
    (long,) = [encode(model.processor, Conversation("c", (), (Turn("a", "b" * limit),)), independent, 10 * limit)]
    assert len(long.input_ids) == limit


def test_what_cannot_be_encoded(chat_model: minifocus.Llava, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation("c", PICTURES[:1], TURNS[:1])
    with pytest.raises(minifocus.InputError, match=r"needs a folder with a tokenizer; .* has none"):
        encode(minifocus.load(folder, "none").processor, conversation)
    tokenizer = chat_model.tokenizer
    assert tokenizer is not None
    monkeypatch.setattr(chat_model.processor, "template", "vicuna")
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "eos_token_id", None)
        with pytest.raises(minifocus.InputError, match="has no token that ends a turn of 'vicuna'"):
            encode(chat_model.processor, conversation)
    with pytest.raises(minifocus.InputError, match="'d'.* more <image> places than pictures"):
        encode(chat_model.processor, replace(conversation, id="d", turns=(TURNS[0], TURNS[1])))
    with pytest.raises(UnusableConversation, match="^conversation 'c': none.png: expected a picture file"):
        encode(chat_model.processor, replace(conversation, images=(Path("none.png"),)))
    for independent in (False, True):  # a tokenizer to which <image> is something else would train on no picture at all
        with monkeypatch.context() as patch:
            patch.setattr(chat_model, "config", replace(chat_model.config, image_token_id=89))
            with pytest.raises((minifocus.InputError, minifocus.CheckpointError), match="<image>"):
                encode(chat_model.processor, conversation, independent)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("template", ["vicuna", "mistral"])
def test_prompts_of_a_subword_vocabulary(file: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The embedded model's, read by either library: the answer's first piece never reaches into the prompt."""
    folder = tmp_path_factory.mktemp("tiny")
    for own in TINY.iterdir():
        if own.name != {"tokenizer.json": "tokenizer.model", "tokenizer.model": "tokenizer.json"}[file]:
            shutil.copy(own, folder)
    model = minifocus.load(folder, "none")
    model.template = template
    assert model.tokenizer is not None
    words = st.text("abZ 09.,:?!é日😀\n", min_size=1, max_size=12).filter(lambda text: text.strip())

    @settings(max_examples=30)
    @given(st.lists(st.tuples(words, words), min_size=1, max_size=3), st.booleans())
    def check(pairs: list[tuple[str, str]], independent: bool) -> None:
        turns = tuple(Turn(question.strip() if independent else question, answer) for question, answer in pairs)
        example = encode(model.processor, Conversation("c", (), turns), independent)
        assert model.tokenizer is not None
        text = ""
        for number, turn in enumerate(turns):
            mine = (example.turn == number) | ((example.turn < 0) & torch.tensor(independent))
            got, labels = example.input_ids[mine].tolist(), example.labels[mine].tolist()
            if independent or not number:
                ids, instruction = asked(model, (), turn.question)
                assert got[: len(ids)] == ids
                assert example.instruction[mine].tolist()[: len(ids)] == instruction
            else:  # read at one go, of which "▁" at the start of a text is not a part
                words = model.tokenizer.decode(example.input_ids[mine & example.instruction].tolist())
                assert words.strip() == turn.question.strip()
            begin = next(i for i, label in enumerate(labels) if label != NO_LABEL)
            assert labels == [NO_LABEL] * begin + got[begin:] and labels[-1] == END
            assert model.tokenizer.decode(labels[begin:]).strip() == turn.answer.strip()
            text += build_prompt(turn.question, 0, template).text + f" {turn.answer.strip()}</s>"
        if not independent:
            assert example.input_ids.tolist() == model.tokenizer.encode(text).ids

    check()


def test_a_process_that_reads_ahead_is_not_sent_the_weights() -> None:
    model = minifocus.load(TINY, "focus")
    batches = Batches(model.processor, CardScenes(count=8), 2, 0, independent=True, max_turns=2)
    sent = pickle.dumps(batches)
    assert len(sent) < 100_000 and len(list(model.parameters())) > 100
    ours, theirs = batches[3], pickle.loads(sent)[3]
    assert torch.equal(ours.input_ids, theirs.input_ids) and torch.equal(ours.tiles[0], theirs.tiles[0])
