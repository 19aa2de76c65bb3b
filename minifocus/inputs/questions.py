"""Questions about pictures from a file, read strictly: one JSON object a line, or a JSON list of them.

    {"id": "7", "image": "a.png", "question": "What does the sign say?"}

`image` may be a list of names, or "images", or missing. The question may hold one `<image>` for each picture; without any, the
pictures come first. In LLaVA's own files of questions the id is "question_id" and the question is "text": they are read, too.
So is a conversation (see `conversations`): each of its questions is asked alone, and its answers are not looked at.

Pictures are named relative to their folder and lie inside it, unless the caller allows others. Other keys are ignored, but for
such as name pictures, films and sounds in another way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image

from ..arguments import shown
from ..errors import InputError
from ..files.reading import FOLDER, kind, named
from ..loading.json_fields import JsonFields
from .conversations import (
    LISTED,
    asked_alone,
    conversation_of,
    id_of,
    picture_file,
    picture_names,
    records_of,
    words_of,
)
from .foreign_media import foreign_key, foreign_place
from .template_writer import IMAGE


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    place   where it stands, for errors
    about   what its answer is written beside: the id, the pictures' names, the question
    """

    place: str
    images: Sequence[Path | Image.Image]
    text: str
    about: dict[str, Any]


def read_questions(
    file: str | PathLike[str], image_folder: str | PathLike[str] | None = None, *, images_anywhere: bool = False
) -> list[Question]:
    """All questions of a file, in its order. Pictures are named relative to `image_folder`: by default the file's own.

    A record without an id gets its number, from 0. Pictures have to be there, but are not opened yet. Raises InputError for
    records that do not follow the format or name a picture that is not there: how many, and the first few with their lines.
    """
    path = Path(file)
    if image_folder is not None and kind(image_folder) != FOLDER:
        raise InputError(f"{named(image_folder)}: expected a folder with pictures, found {kind(image_folder)}")
    folder = path.parent if image_folder is None else Path(image_folder)
    questions: list[Question] = []
    unusable: list[str] = []
    for number, (place, record) in enumerate(records_of(path)):
        try:
            questions += _questions(path, place, record, number, folder, images_anywhere)
        except InputError as error:
            unusable.append(str(error))
    if unusable:
        more = f" (and {len(unusable) - LISTED} more)" if len(unusable) > LISTED else ""
        raise InputError(f"{named(path)}: {'; '.join(unusable[:LISTED])}{more}")
    if not questions:
        raise InputError(f"{named(path)}: expected at least one question, got none")
    return questions


def _questions(path: Path, place: str, value: Any, number: int, folder: Path, images_anywhere: bool) -> list[Question]:
    """Those of one record. Errors begin with its place in the file, then the key."""
    if not isinstance(value, dict):
        raise InputError(f"{place}: expected an object, got {shown(value)}")
    record, where = JsonFields(value, place, failure=InputError), f"{named(path)}: {place}"
    if record.given("conversations"):
        asked = asked_alone(conversation_of(place, value, number, folder, images_anywhere))
        about = {"id": record.get("id", number), "images": picture_names(record)[1]}
        return [
            Question(f"{where}: question {turn}", images, text, {**about, "turn": turn, "question": text})
            for turn, (images, text, _, _) in enumerate(asked)
        ]
    name = id_of(record, "id" if record.given("id") else "question_id")
    key, names = picture_names(record)
    foreign = foreign_key({other: one for other, one in value.items() if other != key}, bool(names))
    if foreign is not None:
        raise record.error(foreign, 'no picture, film or sound that is not under "image"')
    key = "question" if record.given("question") else "text" if record.given("text") else "question"
    text = words_of(record, key)
    foreign = foreign_place(text, bool(names))
    if foreign is not None:
        raise record.error(key, f"no placeholder but {IMAGE}", shown(foreign))
    places = text.count(IMAGE)
    if places not in (0, len(names)):
        raise record.error(key, f"one {IMAGE} for each of {len(names)} pictures, or none", str(places))
    images = [picture_file(record, folder, one, images_anywhere) for one in names]
    return [Question(where, images, text, {"id": number if name is None else name, "images": names, "question": text})]
