"""Tokens to text and back: nothing lost, no half characters, stops found wherever tokens are cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from baton.errors import UnsupportedModel
from baton.rpc.v1 import inference_pb2
from baton.sampling import FinishReason
from baton.text import ChatTemplate, ChoiceText, Detokenizer, StopMatcher, TemplateError, Tokenizer
from tests.unit.router.fakes import MODEL

BUNDLED = Tokenizer.load(MODEL)
UNKNOWN_ID = 1_000_000


def sentencepiece_like() -> Tokenizer:
    """A BPE tokenizer as Llama 2's: spaces are ▁, unknown characters fall back to bytes."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdeh", "▁a", "he"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {piece: at for at, piece in enumerate(pieces)},
            [("▁", "a"), ("h", "e")],
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend)


def metaspace() -> Tokenizer:
    pieces = [("<unk>", 0.0), ("▁", -1.0), *((c, -2.0) for c in "abcdeh"), ("▁he", -1.5)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend)


SENTENCEPIECE = sentencepiece_like()
METASPACE = metaspace()
assert BUNDLED is not None


def pieces_of(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer.create(tokenizer, prompt or [], skip_special_tokens=True)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@pytest.mark.parametrize("tokenizer", [BUNDLED, SENTENCEPIECE], ids=["byte-level", "byte-fallback"])
@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
@settings(max_examples=150)
def test_pieces_join_to_the_text_and_never_split_a_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


@given(ids=st.lists(st.integers(0, 4200), max_size=40))
@settings(max_examples=150)
def test_byte_level_pieces_join_to_what_the_library_decodes_whatever_the_tokens(ids: list[int]) -> None:
    assert "".join(pieces_of(BUNDLED, ids)) == BUNDLED.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("tokenizer", [BUNDLED, SENTENCEPIECE, METASPACE])
@given(ids=st.lists(st.integers(0, 300) | st.just(UNKNOWN_ID), max_size=60))
@settings(max_examples=100)
def test_any_tokens_can_be_detokenized(tokenizer: Tokenizer, ids: list[int]) -> None:
    pieces_of(tokenizer, ids)
    for token_id in ids:
        assert isinstance(tokenizer.token_text(token_id), str)


def test_a_text_that_goes_on_keeps_its_leading_space() -> None:
    prompt = SENTENCEPIECE.encode("he", add_special_tokens=False)
    more = [SENTENCEPIECE.backend.token_to_id("▁a")]
    assert "".join(pieces_of(SENTENCEPIECE, more, prompt)) == " a"
    assert "".join(pieces_of(SENTENCEPIECE, more)) == "a"


def test_an_unfinished_character_becomes_one_replacement_at_the_end() -> None:
    for tokenizer in (BUNDLED, SENTENCEPIECE):
        ids = tokenizer.encode("a🦊", add_special_tokens=False)[:-1]
        assert "".join(pieces_of(tokenizer, ids)).rstrip("�") == "a"


def test_bytes_that_are_no_character_do_not_hold_back_what_follows() -> None:
    bad = [SENTENCEPIECE.backend.token_to_id("<0xFF>")] * 20
    a = SENTENCEPIECE.backend.token_to_id("a")
    pieces = pieces_of(SENTENCEPIECE, [*bad, a, a])
    assert "".join(pieces).endswith("aa")
    assert pieces[9] != "" or pieces[8] != "" or pieces[7] != ""


def test_special_tokens_are_left_out_unless_wanted() -> None:
    ids = [0, *BUNDLED.encode("x", add_special_tokens=False), 1]
    assert "".join(pieces_of(BUNDLED, ids)) == "x"
    detokenizer = Detokenizer.create(BUNDLED, [], skip_special_tokens=False)
    assert "".join(map(detokenizer.push, ids)) == "<|bos|>x<|eos|>"


def test_without_a_tokenizer_every_text_is_empty() -> None:
    detokenizer = Detokenizer.create(None, [1], skip_special_tokens=True)
    assert detokenizer.push(5) + detokenizer.flush() == ""


def test_token_bytes_are_exact_for_parts_of_characters() -> None:
    for tokenizer in (BUNDLED, SENTENCEPIECE):
        text = "h🦊日"
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)).decode().strip() == text


def naive_end(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Where and with what the first stop string is complete, looking at every prefix in turn."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            return end, max(matches, key=len)
    return None


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4, unique=True),
    include=st.booleans(),
)
@settings(max_examples=400)
def test_stops_are_found_as_in_the_whole_text(pieces: list[str], stops: list[str], include: bool) -> None:
    text = "".join(pieces)
    matcher = StopMatcher(stops, include_stop=include)
    shown, found = "", None
    for piece in pieces:
        out, found = matcher.push(piece)
        shown += out
        # Whatever may still become part of a stop string has not been shown, and nothing else is kept.
        assert text.startswith(shown)
        if found:
            break
    expected = naive_end(text, stops)
    if expected is None:
        assert found is None
        assert shown + matcher.flush() == text
    else:
        end, stop = expected
        assert found == stop
        assert shown == text[: end if include else end - len(stop)]


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["\n\nUser:"], include_stop=False)
    assert matcher.push("hello") == ("hello", None)
    assert matcher.push(" you\n") == (" you", None)
    assert matcher.push("!") == ("\n!", None)


def choice_text(stops: list[str], *, include: bool = False, min_tokens: int = 0) -> ChoiceText:
    detokenizer = Detokenizer.create(BUNDLED, [], skip_special_tokens=True)
    return ChoiceText(detokenizer, stops=stops, include_stop=include, min_tokens=min_tokens)


def letters(text: str) -> list[int]:
    return [BUNDLED.backend.token_to_id(letter) for letter in text]


def test_tokens_after_the_one_that_completes_a_stop_are_dropped() -> None:
    marks = [inference_pb2.PositionLogprobs() for _ in range(5)]
    delta = choice_text(["cd"]).push(letters("abcde"), marks)
    assert (delta.text, len(delta.token_ids), len(delta.logprobs)) == ("ab", 4, 4)
    assert (delta.finish_reason, delta.stop_reason) == (FinishReason.STOP, "cd")


def test_no_stop_string_counts_before_min_tokens() -> None:
    text = choice_text(["b"], min_tokens=4)
    assert text.push(letters("ab")).finish_reason is None
    assert text.push(letters("ac")).finish_reason is None
    delta = text.push(letters("db"))
    assert (delta.text, delta.stop_reason) == ("d", "b")


@pytest.mark.parametrize(("include", "shown"), [(False, "a"), (True, "ab")])
def test_a_stop_token_is_shown_only_when_stops_are_included(include: bool, shown: str) -> None:
    last = letters("b")
    text = choice_text([], include=include)
    first = text.push(letters("a")).text
    delta = text.push(last, finish_reason=FinishReason.STOP, stop_token_id=last[0])
    assert (first + delta.text, delta.stop_reason, list(delta.token_ids)) == (shown, last[0], last)


def test_the_last_token_of_a_complete_answer_is_shown() -> None:
    text = choice_text(["x"])
    shown = text.push(letters("a")).text
    delta = text.push(letters("b"), finish_reason=FinishReason.STOP, complete=True)
    assert (shown + delta.text, delta.stop_reason) == ("ab", None)


def test_what_was_held_back_is_shown_at_the_end() -> None:
    text = choice_text(["abc"])
    assert text.push(letters("ab")).text == ""
    assert text.push(letters("a"), finish_reason=FinishReason.LENGTH).text == "aba"


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi {{ 7*7 }}"}]


def test_the_template_renders_as_transformers_renders_it() -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(MODEL)
    ours = ChatTemplate.load(MODEL)
    assert ours is not None
    for prompt in (True, False):
        expected = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
        assert ours.render(CHAT, add_generation_prompt=prompt) == expected
    ids = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert BUNDLED.encode(ours.render(CHAT), add_special_tokens=False) == ids
    for text in ("def f(x):\n    return x", "naïve 日本語 🦊", ""):
        assert BUNDLED.encode(text, add_special_tokens=True) == theirs(text)["input_ids"]


def test_templates_may_use_what_hugging_face_offers() -> None:
    template = ChatTemplate(
        "{% for m in messages %}\n"
        "    {% if loop.index0 > 5 %}{% break %}{% endif %}\n"
        "{{ bos_token }}{% generation %}{{ m.content | tojson }}{% endgeneration %}\n"
        "{% endfor %}\n"
        "{{ strftime_now('%Y') | length }}{% if think is defined and think %} think{% endif %}",
        {"bos_token": "<s>"},
    )
    messages = [{"role": "user", "content": 'é "<b>"'}]
    assert template.render(messages) == '<s>"é \\"<b>\\""4'
    assert template.render(messages, variables={"think": True}).endswith(" think")


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[3].content }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 1 // 0 }}",
    ],
)
def test_a_template_that_fails_says_so(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source, {}).render(CHAT)


def test_the_jinja_file_wins_and_named_templates_have_a_default(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "{{ eos_token }}d"}]
    config = {"chat_template": named, "eos_token": {"content": "</s>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = ChatTemplate.load(tmp_path)
    assert loaded is not None and loaded.render([]) == "</s>d"
    (tmp_path / "chat_template.jinja").write_text("file{{ eos_token }}")
    loaded = ChatTemplate.load(tmp_path)
    assert loaded is not None and loaded.render([]) == "file</s>"


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(UnsupportedModel, match="Jinja"):
        ChatTemplate.load(tmp_path)
