"""A tokenizer's files with a token more: `<image>`, which their code has no token for (it puts -200 among the ids).

Their code tokenizes what is before and after a picture apart. The new files give the same ids, if a space is put behind
`<image>` where a tokenizer begins only a whole text with a space (`gap`).
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.reading import named, present, read_bytes, read_json
from ..inputs.tokenizer import Tokenizer
from ..loading.json_fields import JsonFields

IMAGE = "<image>"
_JSON, _MODEL, _SETTINGS = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
_SPECIAL, _ADDED = "special_tokens_map.json", "added_tokens.json"
_TOKEN = {
    "content": IMAGE,
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
    "special": True,
}
_SAMPLES = ("USER: What is it? 12 éß 中文\n\n two  spaces ASSISTANT: A cat</s>USER: ", "\nWhat is it? ASSISTANT:")

_log = logging.getLogger("minifocus")


@dataclass(frozen=True)
class ImageTokenizer:
    """
    tokenizer  as it was
    image      the id of `<image>`
    gap        what a template has to put behind `<image>`
    files      the new files by name
    """

    tokenizer: Tokenizer
    image: int
    gap: str
    files: dict[str, bytes]


def add_image_token(folder: Path, empty: Path) -> ImageTokenizer:
    """The tokenizer of `folder` with `<image>`; `empty` is a folder for trying it, and is empty again.

    Raises CheckpointError for files that cannot be read, or to which no token can be added.
    """
    old = Tokenizer.from_folder(folder)
    own = old.token_id(IMAGE)
    image = old.vocab_size if own is None else own
    names = [name for name in (_JSON, _MODEL, _SETTINGS, _SPECIAL, _ADDED) if present(folder / name)]
    files = {name: read_bytes(folder / name) for name in names}
    settings = read_json(folder / _SETTINGS) if _SETTINGS in files else {}
    if settings.pop("chat_template", None) is not None:  # of the language model, and not of what was trained
        files[_SETTINGS] = _written(settings)
    if own is None:
        files |= _with_token(folder, image, settings)
    try:
        for name, content in files.items():
            (empty / name).write_bytes(content)
        new = Tokenizer.from_folder(empty)
    finally:
        for name in files:
            (empty / name).unlink(missing_ok=True)
    before, after = _SAMPLES
    found = new.encode(before + IMAGE + after).ids
    same = all(new.encode(text).ids == old.encode(text).ids for text in _SAMPLES)
    if (
        new.token_id(IMAGE) != image
        or found.count(image) != 1
        or (own is None and old.token(image) is not None)
        or not same
    ):
        raise CheckpointError(
            f"{named(folder)}: expected a tokenizer to which {IMAGE} can be added as token {image}, with all others as they were"
        )
    theirs = [*old.encode(before).ids, image, *old.encode(after, special=False).ids]
    gap = next((gap for gap in ("", " ") if new.encode(before + IMAGE + gap + after).ids == theirs), None)
    if gap is None:
        _log.warning("%s: text behind a picture gets other tokens than in the original repository", folder)
    return ImageTokenizer(old, image, gap or "", files)


def _with_token(folder: Path, image: int, settings: dict[str, Any]) -> dict[str, bytes]:
    """The files that change."""
    changed: dict[str, bytes] = {}
    if present(folder / _JSON):
        whole = JsonFields.of_file(folder / _JSON)
        added = whole.get("added_tokens") or []
        whole.check("added_tokens", isinstance(added, list), "a list of tokens")
        changed[_JSON] = _written({**whole.members, "added_tokens": [*added, {"id": image, **_TOKEN}]})
    if "added_tokens_decoder" in settings:
        decoder = {**settings["added_tokens_decoder"], str(image): _TOKEN}
        return changed | {_SETTINGS: _written({**settings, "added_tokens_decoder": decoder})}
    if not present(folder / _MODEL):
        return changed
    older = read_json(folder / _ADDED) if present(folder / _ADDED) else {}
    special = read_json(folder / _SPECIAL) if present(folder / _SPECIAL) else {}
    key = "extra_special_tokens" if settings.get("extra_special_tokens") else "additional_special_tokens"
    key = "extra_special_tokens" if special.get("extra_special_tokens") else key
    tokens = special.get(key, settings.get(key)) or []
    listed = {**tokens, "image_token": IMAGE} if isinstance(tokens, dict) else [*tokens, IMAGE]
    return changed | {_ADDED: _written({**older, IMAGE: image}), _SPECIAL: _written({**special, key: listed})}


def _written(members: dict[str, Any]) -> bytes:
    return (json.dumps(members, indent=2, ensure_ascii=False) + "\n").encode()
