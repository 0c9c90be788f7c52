"""The bytes of one vocabulary entry, by the `decoder` of tokenizer.json."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class UnsupportedDecoderError(ValueError):
    """A decoder whose output is not the concatenation of its tokens' bytes."""


@dataclass(frozen=True)
class PieceDecoder:
    """How an entry is written: in GPT-2's alphabet of bytes, or as text with a sign for the space.

    `space` is that sign, `has_byte_pieces` says that "<0xE4>" stands for a byte.
    """

    is_byte_level: bool = False
    space: str | None = None
    has_byte_pieces: bool = False
    drops_first_space: bool = False

    def piece_bytes(self, piece: str) -> bytes:
        if self.is_byte_level:
            # Entries that hold anything but byte characters are text as it is.
            return (
                bytes(BYTE_OF_CHAR[c] for c in piece) if BYTE_OF_CHAR.keys() >= set(piece) else piece.encode()
            )
        if self.has_byte_pieces and (match := BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        return (piece.replace(self.space, " ") if self.space else piece).encode()


def read_decoder(spec: dict[str, Any] | None) -> PieceDecoder:
    """The decoder of a tokenizer.json; UnsupportedDecoderError names a part that is not known here."""
    if spec is None:
        raise UnsupportedDecoderError('"decoder" is null: cannot tell how tokens join to text')
    decoder = PieceDecoder()
    for part in spec["decoders"] if spec["type"] == "Sequence" else [spec]:
        decoder = _with_part(decoder, part)
    return decoder


def _with_part(decoder: PieceDecoder, part: dict[str, Any]) -> PieceDecoder:
    match part:
        case {"type": "ByteLevel"}:
            return replace(decoder, is_byte_level=True)
        case {"type": "ByteFallback"}:
            return replace(decoder, has_byte_pieces=True)
        case {"type": "Fuse"}:
            return decoder
        case {"type": "Replace", "pattern": {"String": space}, "content": " "}:
            return replace(decoder, space=space)
        case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0}:
            return replace(decoder, drops_first_space=start == 1)
        case {"type": "Metaspace", "replacement": space}:
            return replace(decoder, space=space, drops_first_space=part.get("prepend_scheme") != "never")
    raise UnsupportedDecoderError(
        f'decoder {part} is not supported: known are "ByteLevel", "Metaspace", and sequences of '
        '"Replace" (a sign by a space), "ByteFallback", "Fuse" and "Strip" (one space at the start)'
    )


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 and on."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()
