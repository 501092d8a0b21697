"""How a model folder's tokenizer.json is loaded, and what text and bytes each token id stands for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import orjson
import tokenizers

from baton.errors import UnsupportedModel
from baton.text.encoder import encoder

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """The byte each character of a byte-level BPE piece stands for.

    Printable Latin-1 bytes stand for themselves; the other bytes, in order, for U+0100 and up.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + at): byte for at, byte in enumerate(others)})
    return alphabet


class Tokenizer:
    """A fast tokenizer as its `tokenizer.json` describes it, without truncation or padding."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self._encode = encoder(backend)
        self.special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        decoder = orjson.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
        self._spaces = "▁" in str(decoder)
        self._byte_fallback = "ByteFallback" in str(decoder)
        # Byte-level pieces concatenate to the text's bytes, so one token can be decoded on its own.
        self.byte_level = decoder.get("type") == "ByteLevel"
        self._alphabet = _byte_level_alphabet()
        self._bytes: dict[int, bytes] = {}
        self._longest_token = max((len(piece) for piece in backend.get_vocab()), default=1)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer of a model folder, or None when it has no tokenizer.json.

        Raises:
            UnsupportedModel: the file is there and cannot be read.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise UnsupportedModel(f"{path} cannot be read as a tokenizer: {error}") from error

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`; `add_special_tokens`: those its post-processor adds (BOS, usually)."""
        return self._encode(text, add_special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of `token_ids`; ids the vocabulary lacks stand for nothing."""
        text: str = self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def special_id(self, text: str) -> int | None:
        """The special token of this text, if there is one."""
        token_id: int | None = self.backend.token_to_id(text)
        return token_id if token_id in self.special_ids else None

    def fewest_tokens(self, text: str) -> int:
        """A lower bound on the tokens of `text`, without tokenizing it."""
        return len(text) // self._longest_token

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to the middle of a text; empty for an id the vocabulary lacks."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._compute_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, with U+FFFD for bytes that are not whole characters."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _compute_bytes(self, token_id: int) -> bytes:
        piece = self.backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self.byte_level:
            # An added token may hold characters outside the alphabet; then it is meant literally.
            if all(character in self._alphabet for character in piece):
                return bytes(self._alphabet[character] for character in piece)
            return piece.encode()
        if self._byte_fallback and (byte := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        if self._spaces:
            return piece.replace("▁", " ").encode()
        return self.decode([token_id], skip_special_tokens=False).encode()
