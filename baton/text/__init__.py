"""Text to tokens and back: tokenizer, chat template, incremental detokenizing, stop strings. No torch."""

from baton.text.chat import ChatTemplate, TemplateError
from baton.text.detokenizer import Detokenizer
from baton.text.output import ChoiceText, Delta
from baton.text.stops import StopMatcher
from baton.text.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "ChoiceText",
    "Delta",
    "Detokenizer",
    "StopMatcher",
    "TemplateError",
    "Tokenizer",
]
