"""How text becomes token ids quickly: by fastokens where it agrees with the reference, else by that."""

from __future__ import annotations

import logging
from collections.abc import Callable

import tokenizers

try:
    import fastokens
except ImportError:  # there are no wheels of it for every machine
    fastokens = None

log = logging.getLogger(__name__)

Encode = Callable[[str, bool], list[int]]
"""Token ids of a text; the flag adds the tokens that the tokenizer's post-processor adds (BOS, usually)."""

# What pre-tokenizers, normalizers and byte fallbacks treat in ways of their own.
_PROBES = (
    "",
    " ",
    "Hello, world! It's we'll THEY'RE o'clock ’s ſ'ſ",
    "  two  spaces\ttab\n\n newline \r\n\u00a0\u3000\u2028\x85\x1c end   ",
    "1 12 123 1234567 3.14 ٣٤ Ⅷ ² ½",
    "def f(x):\n    return {'a': [x**2, -1]}  # ...???!!\n\n\n",
    "naïve café e\u0301 İıßǅﬁ 日本語テキスト 한국어 กำลัง हिन्दी العربية",
    "🦊👨‍👩‍👧 \ue000\U0001d400\U0010ffff\ufeff\ufffd\x00",
    "snake_case CamelCase HTTPServer iPhone15 http://a.b/c?d=e&f=%20",
)


def encoder(reference: tokenizers.Tokenizer) -> Encode:
    """The fastest exact `Encode` for a tokenizer, as it is now.

    fastokens encodes as the tokenizers of most language models do, an order of magnitude faster than the
    library that defines what is right. It is used where it takes the tokenizer and the two agree on texts
    known to be hard.
    """

    def slowly(text: str, add_special_tokens: bool) -> list[int]:
        # The batch call has a variant that does not track character offsets, a quarter faster.
        ids: list[int] = reference.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    if fastokens is None:
        log.info("the tokenizer is encoded by tokenizers, several times slower: fastokens is not installed")
        return slowly
    try:
        fast = fastokens.Tokenizer.from_json_str(reference.to_str())
    except Exception as error:  # the library raises what its parts raise
        log.info("the tokenizer is encoded by tokenizers, several times slower: fastokens says %s", error)
        return slowly

    def quickly(text: str, add_special_tokens: bool) -> list[int]:
        try:
            ids: list[int] = fast.encode(text, add_special_tokens).ids
        except ValueError:  # a limit of its regular expressions
            return slowly(text, add_special_tokens)
        return ids

    added = [token.content for token in reference.get_added_tokens_decoder().values()]
    for probe in (*_PROBES, *(f"a {content} b{content}\n{content}" for content in added)):
        for special in (True, False):
            if quickly(probe, special) != slowly(probe, special):
                log.warning("fastokens encodes %r differently; the slower tokenizers is used", probe)
                return slowly
    return quickly
