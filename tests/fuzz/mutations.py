"""Bytes that are nearly right: a good message with a few places cut, doubled, swapped or overwritten."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

# Where parsers go wrong: ends of number ranges, lengths, signs, quotes, brackets, invalid UTF-8.
_NASTY = (
    *(b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\xff\x0f", b"\xff" * 9 + b"\x01", b"\xed\xa0\x80"),
    *(b"-1", b"0", b"1e999", b"-0.0", b"NaN", b"null", b"true", b"[]", b"{}", b'""', b"[[[[[[[[", b'{"":'),
    *(b"18446744073709551616", b"9" * 400, b'"\\ud800"', b",", b":", b'"', b"\\", b"\r\n", b": ", b" "),
)


@st.composite
def mutated(draw: st.DrawFn, seeds: Sequence[bytes], most: int = 8) -> bytes:
    """One of the seeds, changed in up to `most` places."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, most))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 16)))
        piece = data[start:end]
        data = data[:start] + draw(_replacement(piece)) + data[end:]
    return data


def _replacement(piece: bytes) -> st.SearchStrategy[bytes]:
    """What may come in the place of `piece`."""
    return st.one_of(
        st.just(b""),
        st.just(piece * 2),
        st.just(piece[::-1]),
        st.sampled_from(_NASTY),
        st.binary(min_size=1, max_size=4),
        st.integers(0, 7).map(lambda bit: bytes(byte ^ (1 << bit) for byte in piece)),
    )
