"""The table of a tokenizer.model: sentencepiece's byte-pair encoding has scores of pieces instead of merges of pairs."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from ..arguments import shown
from ..errors import CheckpointError
from ..files.reading import named
from ..inputs.tokenizer import SentencePieceBackend
from . import character_classes
from . import table_format as form
from .protobuf import fields_of
from .table_format import Added, Table

# Fields of sentencepiece_model.proto, and their values.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _KIND = 1, 2, 3
_NORMAL, _UNKNOWN, _CONTROL, _WHOLE, _UNUSED, _BYTE = range(1, 7)  # "user defined" ones are taken whole
_MODEL_TYPE, _BYTE_FALLBACK = 3, 35
_BPE = 2
_CHARACTER_MAP = 2


def table_of(backend: SentencePieceBackend, file: Path) -> Table:
    """The table without its tokens' texts. Raises CheckpointError, which names `file`."""
    model = fields_of(backend.model.serialized_model_proto())
    trainer, normalizer = (fields_of(b"".join(_messages(model, key))) for key in (_TRAINER, _NORMALIZER))
    _expect(file, "trainer_spec.model_type", _last(trainer, _MODEL_TYPE, 1) == _BPE, "BPE")
    _expect(file, "trainer_spec.byte_fallback", _last(trainer, _BYTE_FALLBACK, 0) == 1, "true")
    _expect(file, "normalizer_spec.precompiled_charsmap", not _last(normalizer, _CHARACTER_MAP, b""), "none")

    table = Table(form.SENTENCEPIECE, form.STRIPPED_SPACES if backend.prefix else form.SPACES)
    table.prefix, table.prefix_everywhere = bool(backend.prefix), backend.every_segment
    table.before = [] if backend.bos is None else [backend.bos]
    table.after = [] if backend.eos is None else [backend.eos]
    table.added = [
        Added(backend.ids[text], text, text in backend.left, text in backend.right, False) for text in backend.order
    ]
    table.added_space = character_classes.python_space()
    for token in table.added:
        both = token.takes_left and token.text[0].isspace()
        _expect(file, f"the added token {token.text!r}", not both, "white space inside it or before it, not both")
    _add_pieces(table, [fields_of(piece) for piece in _messages(model, _PIECES)], file)
    return table


def _add_pieces(table: Table, pieces: list[dict[int, Any]], file: Path) -> None:
    ids, scores, kinds, bytes_ = {}, {}, {}, {}
    for token_id, piece in enumerate(pieces):
        text = _last(piece, _PIECE, b"").decode()
        kind = _last(piece, _KIND, _NORMAL)
        _expect(file, f"the piece {text!r}", kind != _UNUSED and text not in ids, "one that is used, and only once")
        ids[text], kinds[text] = token_id, kind
        scores[text] = struct.unpack("<f", _last(piece, _SCORE, bytes(4)))[0]
        if kind == _BYTE:
            bytes_[text] = token_id
    written = [f"<0x{byte:02X}>" for byte in range(256)]
    _expect(file, "the pieces of bytes", bytes_.keys() == set(written), "one for each of 256")
    table.unknown, table.unknown_ids = form.BYTES, [bytes_[token] for token in written]
    table.whole = [token_id for text, token_id in ids.items() if kinds[text] == _WHOLE]
    table.characters = {text: token_id for text, token_id in ids.items() if len(text) == 1 and kinds[text] != _UNKNOWN}

    # Two neighbours become a piece wherever their texts together are one; the highest score is first.
    normal = {text for text in ids if kinds[text] == _NORMAL}
    ranks = {score: rank for rank, score in enumerate(sorted({scores[text] for text in normal}, reverse=True))}
    for text in normal:
        for cut in range(1, len(text)):
            sides = text[:cut], text[cut:]
            for side in sides:
                known = len(side) > 1 or side in table.characters
                _expect(file, f"the piece {text!r}", known, "a piece for each of its characters")
            left, right = sides
            if all(side in normal or (len(side) == 1 and kinds[side] != _WHOLE) for side in sides):
                table.merges.append((ids[left], ids[right], ranks[scores[text]], ids[text]))


def _messages(message: dict[int, Any], key: int) -> list[bytes]:
    return message.get(key, [])


def _last(message: dict[int, Any], key: int, default: Any) -> Any:
    return message.get(key, [default])[-1]


def _expect(file: Path, what: str, holds: bool, expected: str) -> None:
    if not holds:
        raise CheckpointError(f"{named(file)}: {shown(what)[1:-1]}: expected {expected}, which the C++ runtime needs")
