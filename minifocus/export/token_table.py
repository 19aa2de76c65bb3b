"""tokenizer.bin: a folder's tokenizer as the C++ runtime reads it (csrc/runtime/text).

The runtime has one byte-pair encoder of its own, and this table tells it all that it needs, the classes of characters too. A
tokenizer that the table cannot describe exactly is refused here.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import CheckpointError
from ..files import writing
from ..inputs.tokenizer import BYTE_TOKEN, Tokenizer, TokenizersBackend
from . import json_table, sentencepiece_table
from .table_format import IS_BYTE, IS_SPECIAL, IS_TOKEN, Table


def write(tokenizer: Tokenizer, folder: str | os.PathLike[str], file: Path) -> None:
    """Write the table of `tokenizer`, which was read from `folder`, to `file`.

    Raises CheckpointError, which names the folder's file and the key, for a tokenizer that the runtime does not have, and
    InputError where `file` cannot be written.
    """
    backend = tokenizer.backend
    if isinstance(backend, TokenizersBackend):
        source = Path(folder) / "tokenizer.json"
        table = json_table.table_of(backend, source)
    else:
        source = Path(folder) / "tokenizer.model"
        table = sentencepiece_table.table_of(backend, source)
    for token_id in range(tokenizer.vocab_size):
        text = tokenizer.token(token_id)
        special = IS_SPECIAL * (token_id in backend.special)
        byte = IS_BYTE * bool(BYTE_TOKEN.fullmatch(text or ""))
        table.tokens.append((text or "", 0 if text is None else IS_TOKEN | special | byte))
    table.bos_id = -1 if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    _check(table, source)
    content = table.to_bytes()
    writing.replace(file, lambda unfinished: unfinished.write_bytes(content))


def _check(table: Table, source: Path) -> None:
    """Whether the rules that the table follows are the library's for these tokens."""
    for text, _ in table.tokens:
        if len(text.encode()) == 6 and text.startswith("<0x+") and text.endswith(">"):
            raise CheckpointError(
                f"{source}: {text}: a token that the package tokenizers takes for a byte is not supported"
            )
    ids = [token.token_id for token in (*table.added, *table.normalized_added)]
    if max([*ids, *table.before, *table.after], default=0) >= len(table.tokens):
        raise CheckpointError(
            f"{source}: post_processor: adds a token that the vocabulary of {len(table.tokens)} does not have"
        )
    for tokens in (table.added, table.normalized_added):
        takes = next((token.text for token in tokens if token.takes_right), None)
        begins = next((token.text for token in tokens if token.text[:1].isspace()), None)
        if takes is not None and begins is not None and not table.by_expression:
            raise CheckpointError(
                f"{source}: added_tokens: {takes!r} takes the white space with which {begins!r} begins, "
                "which the C++ runtime does not support"
            )
