"""The few parts of the protobuf encoding that MindSpore's files need.

Not the protobuf library: imported before MindSpore it makes MindSpore's import fail (its generated modules need the
library's Python implementation, which MindSpore asks for itself), and checkpoints are to be read without MindSpore.
"""
from __future__ import annotations

from collections.abc import Iterator

VARINT, BYTES = 0, 2                       # wire types


def encode_varint(value: int) -> bytes:
    """A whole number; negative ones take ten bytes, as the format says."""
    value &= 0xFFFFFFFFFFFFFFFF
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def encode_field(number: int, value: int | bytes) -> bytes:
    """A field of a message: a whole number, or a text or message as bytes."""
    if isinstance(value, bytes):
        return encode_varint(number << 3 | BYTES) + encode_varint(len(value)) + value
    return encode_varint(number << 3 | VARINT) + encode_varint(value)


def decode_varint(data: bytes, position: int) -> tuple[int, int]:
    """A whole number, without its sign, and the position after it.

    Raises:
        ValueError: when the bytes end inside it, or it has more than 64 bits.
    """
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ValueError(f"the message ends inside a number, at byte {position}")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def decode_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message, in order.

    Raises:
        ValueError: for bytes that are no message, or hold other types of fields.
    """
    position = 0
    while position < len(data):
        key, position = decode_varint(data, position)
        number, wire = key >> 3, key & 7
        if wire not in (VARINT, BYTES):
            raise ValueError(f"a field of unknown type at byte {position}")
        value, position = decode_varint(data, position)
        if wire == VARINT:
            yield number, value
            continue
        end = position + value
        if end > len(data):
            raise ValueError(f"a field should end at byte {end}, the message has {len(data)}")
        yield number, data[position:end]
        position = end


def signed(value: int) -> int:
    """A decoded number as a signed one."""
    return value - (1 << 64) if value >> 63 else value


def numbers(values: list[int | bytes]) -> list[int]:
    """A repeated field of whole numbers, packed or not."""
    found: list[int] = []
    for value in values:
        if isinstance(value, int):
            found.append(signed(value))
            continue
        position = 0
        while position < len(value):        # packed: numbers without keys
            number, position = decode_varint(value, position)
            found.append(signed(number))
    return found
