"""Reading a protobuf message without its schema: sentencepiece's package has no way to ask for some of its model's fields."""

from __future__ import annotations


def fields_of(message: bytes) -> dict[int, list[bytes | int]]:
    """The values of each field by its number, in the message's order: whole numbers, and the bytes of all else.

    Raises ValueError for what is no message.
    """
    found: dict[int, list[bytes | int]] = {}
    at = 0
    while at < len(message):
        tag, at = _whole(message, at)
        wire = tag & 7
        value: bytes | int
        if wire == 0:
            value, at = _whole(message, at)
        else:
            if wire == 2:
                size, at = _whole(message, at)
            elif wire in (1, 5):
                size = 8 if wire == 1 else 4
            else:
                raise ValueError(f"wire type {wire}")
            value, at = message[at : at + size], at + size
            if at > len(message):
                raise ValueError("cut off")
        found.setdefault(tag >> 3, []).append(value)
    return found


def _whole(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise ValueError("cut off")
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
