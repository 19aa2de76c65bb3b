"""Questions and answers about pictures in LLaVA's JSON format, read strictly.

A file is a JSON list of records, or, where its name ends in .jsonl, one record per line:

    {"id": "7", "image": "a.png",                 (or a list of names, or "images"; none for a conversation about no picture)
     "conversations": [{"from": "human", "value": "<image>\\nWhat does the sign say?"}, {"from": "gpt", "value": "stop"}],
     "families": ["read"]}                        (optional, not LLaVA's: the family of each question)

The two sides take turns, and the questions hold one `<image>` for each picture. If a question holds only one, it is moved to the
front, as in LLaVA's own training: many of its records have it at the end, where no word of the question would follow the
picture. A last question without an answer is left out. Anything else is refused, with the file, the record and the key. So are
pictures, films and sounds under another key or placeholder, which the conversation would lose, and also system prompts, tools
and weights of answers. Other keys are ignored.

Pictures are named relative to their folder and lie inside it, unless the caller allows others. A link in it may lead anywhere.
"""

from __future__ import annotations

import io
import json
import logging
import ntpath
import os
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image

from ..arguments import shown
from ..errors import InputError
from ..files.reading import FILE, FOLDER, NOTHING, kind, named, opened
from ..loading.json_fields import JsonFields
from .foreign_media import foreign_key, foreign_place
from .template_writer import IMAGE

# How many unusable records an error message lists.
LISTED = 5

_log = logging.getLogger("minifocus")


@dataclass(frozen=True, slots=True)
class Turn:
    """A question with its `<image>` places, its answer, and the question's family if it has one."""

    question: str
    answer: str
    family: str | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns about `images`, in the order of the `<image>` places. `id` need not be unique: LLaVA's are not."""

    id: str
    images: tuple[Path | Image.Image, ...]
    turns: tuple[Turn, ...]


def read_conversations(
    file: str | PathLike[str],
    image_folder: str | PathLike[str] | None = None,
    skip_unusable: bool = False,
    *,
    images_anywhere: bool = False,
) -> list[Conversation]:
    """All records of a file, in its order. Pictures are named relative to `image_folder`: by default the file's own.

    A record without an id gets its number, from 0. A first turn of "gpt" answers nothing and is left out, as LLaVA's own
    training does; a "system" turn is refused. Pictures have to be there, but are not opened and checked yet:
    see `minifocus.inputs.open_image`. A name that leads out of the folder (absolute, or by "..") is refused, unless
    `images_anywhere` says that the file's author may name every picture of this machine.

    Raises InputError for records that do not follow the format or name a picture that is not there: how many, and the
    first few of them. With `skip_unusable` they are left out and a warning says the same.
    """
    path = Path(file)
    if image_folder is not None and kind(image_folder) != FOLDER:
        raise InputError(f"{named(image_folder)}: expected a folder with pictures, found {kind(image_folder)}")
    folder = path.parent if image_folder is None else Path(image_folder)
    conversations: list[Conversation] = []
    unusable: list[str] = []
    count = 0
    for count, (place, record) in enumerate(records_of(path), 1):
        try:
            conversations.append(conversation_of(place, record, count - 1, folder, images_anywhere))
        except InputError as error:
            unusable.append(str(error))
    if not count:
        raise InputError(f"{named(path)}: expected at least one record, got none")
    if unusable:
        more = f" (and {len(unusable) - LISTED} more)" if len(unusable) > LISTED else ""
        listed = "; ".join(unusable[:LISTED]) + more
        if not skip_unusable or not conversations:
            raise InputError(f"{named(path)}: {listed}")
        _log.warning("%s: %d of %d records are left out: %s", named(path), len(unusable), count, listed)
    return conversations


def asked_alone(
    conversation: Conversation,
) -> Iterator[tuple[tuple[Path | Image.Image, ...], str, str, str | None]]:
    """Each turn as if it were the only one, about all of the pictures: (images, question, answer, family).

    A question that holds all of the `<image>` places keeps them. Otherwise it loses its own, and `build_prompt` puts all of the
    pictures in front. So a later turn is asked about the pictures of the first.
    """
    for turn in conversation.turns:
        question = turn.question
        if question.count(IMAGE) != len(conversation.images):
            question = question.replace(IMAGE, "").strip()
        yield conversation.images, question, turn.answer, turn.family


def records_of(path: Path) -> Iterator[tuple[str, Any]]:
    """The file's records, unchecked, each with its place. Lines count from 1 as in editors, records from 0 as in JSON."""
    found = kind(path)
    if found != FILE:
        raise InputError(f"{named(path)}: expected a JSON file, found {found}")
    with opened(path, InputError) as stream:
        try:
            text = io.TextIOWrapper(stream, encoding="utf-8-sig").read()
        except (OSError, ValueError) as error:
            raise InputError(f"{named(path)}: not readable as text: {error}") from error
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a JSON string may hold a U+2028
            if line.strip():
                yield f"line {number}", _parse(line, f"{named(path)}: line {number}")
        return
    records = _parse(text, named(path))
    if not isinstance(records, list):
        raise InputError(f"{named(path)}: expected a list of records, got {shown(records)}")
    for number, record in enumerate(records):
        yield f"record {number}", record


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not readable as JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. A key that is there twice is an error, where json would silently drop the first."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"a key is there twice in {shown(pairs)}")
    return fields


def conversation_of(place: str, value: Any, number: int, folder: Path, images_anywhere: bool) -> Conversation:
    """Check one record. Errors begin with its place in the file, then the key."""
    if not isinstance(value, dict):
        raise InputError(f"{place}: expected an object, got {shown(value)}")
    record = JsonFields(value, place, failure=InputError)
    name = id_of(record, "id")
    key, images = picture_names(record)
    turns = _turns(record)
    _refuse_what_is_not_used(record, turns, key, bool(images))
    places = sum(turn.question.count(IMAGE) for turn in turns)
    if places != len(images):
        raise record.error("conversations", f"one {IMAGE} for each of {len(images)} pictures", str(places))
    files = tuple(picture_file(record, folder, image, images_anywhere) for image in images)
    return Conversation(str(number if name is None else name), files, turns)


def id_of(record: JsonFields, key: str) -> str | int | None:
    """A record's id, if it has one."""
    name = record.get(key)
    record.check(key, name is None or type(name) in (str, int), "text or a whole number")
    return name


def picture_names(record: JsonFields) -> tuple[str, list[str]]:
    """The key under which a record names its pictures, and their names."""
    key = "image" if record.given("image") else "images"
    images = record.get(key)
    images = [] if images is None else [images] if isinstance(images, str) else images
    names = isinstance(images, list) and all(isinstance(image, str) and image for image in images)
    record.check(key, names, "a picture's name or a list of them")
    return key, images


def _refuse_what_is_not_used(record: JsonFields, turns: tuple[Turn, ...], read: str, pictures: bool) -> None:
    """Refuse what would be silently lost although it changes what the conversation teaches. `read` is the key of its pictures."""
    said = [_turn(record, i) for i, turn in enumerate(record.get("conversations")) if isinstance(turn, dict)]
    for fields in (record, *said):
        others = {key: value for key, value in fields.members.items() if fields is not record or key != read}
        key = foreign_key(others, pictures)
        if key is not None:
            raise fields.error(key, 'no picture, film or sound that is not under "image"')
    for turn in turns:
        place = foreign_place(turn.question, pictures)
        if place is not None:
            raise record.error("conversations", f"no placeholder but {IMAGE}", shown(place))
    for key in ("system", "tools"):
        if record.get(key):
            raise record.error(key, "none, as the model's template says what stands before the first question")
    for fields in said:
        for key in ("loss", "weight", "train", "training"):
            counts = fields.get("from") != "gpt" or fields.get(key) in (None, 1)
            fields.check(key, counts, "1, as every answer counts alike")


def picture_file(record: JsonFields, folder: Path, name: str, anywhere: bool) -> Path:
    """The file that a record names."""
    if "://" in name[:16] or name[:5].lower() == "data:":
        raise record.error("image", "the name of a file, and not a URL", shown(name))
    # Read as Windows does, with both kinds of slash, so that a name leads out of the folder on every system or on none.
    drive, way = ntpath.splitdrive(name)
    if not anywhere and (drive or way.startswith(("/", "\\")) or ntpath.normpath(way).split("\\")[0] == ".."):
        raise record.error("image", f"a name inside of {named(folder)} (images_anywhere takes others)", shown(name))
    file = folder / (name if anywhere else os.path.normpath(name))  # so that a .. after a link stays in this folder
    found = kind(file)
    if found == FILE:
        return file
    what = "no such file" if found == NOTHING else f"expected a file, found {found}"
    raise InputError(f"{record.where}: image: {named(file)}: {what}")


def _turns(record: JsonFields) -> tuple[Turn, ...]:
    said = record.get("conversations")
    record.check("conversations", isinstance(said, list), "a list of what human and gpt say in turn")
    skip = 1 if said and isinstance(said[0], dict) and said[0].get("from") == "gpt" else 0
    values = [_value(record, i, "gpt" if (i - skip) % 2 else "human") for i in range(skip, len(said))]
    if len(values) < 2:
        got = f"{len(values)} turns"
        raise record.error("conversations", "questions with an answer to each", got)
    questions, answers = [_picture_first(question) for question in values[: len(values) // 2 * 2 : 2]], values[1::2]
    families = record.get("families")
    if families is None:
        families = [None] * len(questions)
    else:
        names = isinstance(families, list) and all(isinstance(family, str) and family for family in families)
        record.check("families", names, "a list of names")
    record.check("families", len(families) == len(questions), f"one for each of {len(questions)} questions")
    return tuple(Turn(*turn) for turn in zip(questions, answers, families, strict=True))


def _turn(record: JsonFields, number: int) -> JsonFields:
    """One of the conversation's turns, which is an object."""
    turn = record.get("conversations")[number]
    return JsonFields(turn, record.where, f"conversations[{number}].", record.failure)


def _picture_first(question: str) -> str:
    """Move a question's only `<image>` to the front, on a line of its own. Several stay where they are."""
    if question.count(IMAGE) != 1 or question.startswith(IMAGE):
        return question
    return f"{IMAGE}\n{question.replace(IMAGE, '').strip()}"


def _value(record: JsonFields, number: int, side: str) -> str:
    """The text of a turn, which has to be by `side`. It has words, and `<image>` places only in a question."""
    turn = record.get("conversations")[number]
    if not isinstance(turn, dict):
        raise record.error(f"conversations[{number}]", 'an object with "from" and "value"', shown(turn))
    said = _turn(record, number)
    said.check("from", said.get("from") == side, repr(side))
    value = said.get("value")
    said.check("value", side != "gpt" or not isinstance(value, str) or IMAGE not in value, f"an answer without {IMAGE}")
    return words_of(said, "value")


def words_of(record: JsonFields, key: str) -> str:
    """The text under a key, which has words beside its `<image>` places."""
    value = record.get(key)
    record.check(key, isinstance(value, str) and value.replace(IMAGE, "").strip() != "", "text")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can hold half of a surrogate pair, which a tokenizer cannot read
        raise record.error(key, "whole characters") from None
    return value
