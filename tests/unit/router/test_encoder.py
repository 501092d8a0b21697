"""The fast encoder gives the tokens of the library that defines what is right, or is not used."""

from __future__ import annotations

import json

import fastokens
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from baton.text.encoder import encoder
from tests.unit.router.fakes import MODEL

BUNDLED = json.loads((MODEL / "tokenizer.json").read_text())
GPT2 = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
DIGITS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
STRIPPING = [
    {**token, "lstrip": at % 2 == 0, "rstrip": at % 3 == 0, "normalized": at % 5 == 4}
    for at, token in enumerate(BUNDLED["added_tokens"])
]
KINDS = {
    "bundled": BUNDLED,
    "gpt2": {**BUNDLED, "pre_tokenizer": GPT2},
    "digits": {**BUNDLED, "pre_tokenizer": DIGITS},
    "nfc": {**BUNDLED, "normalizer": {"type": "NFC"}},
    "stripping": {**BUNDLED, "added_tokens": STRIPPING},
}
REFERENCES = {kind: tokenizers.Tokenizer.from_str(json.dumps(content)) for kind, content in KINDS.items()}
ENCODERS = {kind: encoder(reference) for kind, reference in REFERENCES.items()}
TEXTS = st.lists(
    st.text(st.characters(codec="utf-8"), max_size=8)
    | st.sampled_from(
        ["<|user|>", "<|end|>", "<|bos", " ", "\n", "'s", "'LL", "the ", "12", "e\u0301", "🦊"]
    ),
    max_size=20,
).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS, special=st.booleans())
@settings(max_examples=150)
def test_every_text_has_the_tokens_the_reference_gives_it(kind: str, text: str, special: bool) -> None:
    expected = REFERENCES[kind].encode(text, add_special_tokens=special).ids
    assert ENCODERS[kind](text, special) == expected


def test_a_tokenizer_that_is_not_taken_is_encoded_by_the_reference() -> None:
    reference = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("a", -2.0)], 0, False))
    reference.pre_tokenizer = pre_tokenizers.Metaspace()
    with pytest.raises(ValueError, match="unsupported"):
        fastokens.Tokenizer.from_json_str(reference.to_str())
    assert encoder(reference)("a a", False) == reference.encode("a a").ids


def test_a_fast_encoder_that_disagrees_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = fastokens.Tokenizer.from_json_str(json.dumps(KINDS["gpt2"]))
    monkeypatch.setattr(fastokens.Tokenizer, "from_json_str", staticmethod(lambda _: other))
    assert encoder(REFERENCES["bundled"])("the", True) == REFERENCES["bundled"].encode("the").ids
    assert "differently" in caplog.text


def test_without_fastokens_the_reference_encodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.text.encoder.fastokens", None)
    assert encoder(REFERENCES["bundled"])("the end", True) == REFERENCES["bundled"].encode("the end").ids
