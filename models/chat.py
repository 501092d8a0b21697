"""Which conversations teach the bundled models to answer?

Questions and answers are cut out of the corpus itself: docstrings, signatures, short functions and
chapters of the language reference, plus a few written by hand for greetings and for questions that
a model of this size should decline.
"""

import ast
import inspect
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from corpus import Document

_ANSWER_CHARACTERS = 700
_FUNCTION_LINES = 30


@dataclass(frozen=True)
class Pair:
    """An answer and the ways to ask for it; training draws one of them each time."""

    questions: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Message:
    """One turn: `role` is system, user or assistant."""

    role: str
    content: str


_Function = ast.FunctionDef | ast.AsyncFunctionDef


def training_pairs(documents: Iterable[Document]) -> list[Pair]:
    """All pairs of `documents`, with the hand-written ones repeated until they are noticed."""
    pairs = [pair for document in documents for pair in pairs_from(document)]
    by_hand = small_talk()
    # One in twenty: enough for a reliable greeting, too little to drown the library.
    repeats = max(1, len(pairs) // (20 * len(by_hand)))
    return pairs + by_hand * repeats


def pairs_from(document: Document) -> list[Pair]:
    """The pairs that one document yields; none when it has no docstring to ask about."""
    if document.name.startswith("topics/"):
        return list(_topic_pairs(document))
    if document.name.startswith("c/"):
        return list(_docstring_pairs(document.name.removeprefix("c/"), document.text))
    return list(_source_pairs(document))


def conversations(pairs: list[Pair], rng: random.Random) -> Iterator[list[Message]]:
    """Every pair once, in random order, grouped into conversations of one to three questions."""
    order = rng.sample(pairs, len(pairs))
    while order:
        messages = [Message("system", rng.choice(_SYSTEM_PROMPTS))] if rng.random() < 0.2 else []
        for _ in range(min(len(order), rng.choice((1, 1, 1, 2, 3)))):
            pair = order.pop()
            messages.append(Message("user", rng.choice(pair.questions)))
            messages.append(Message("assistant", pair.answer))
        yield messages


def small_talk() -> list[Pair]:
    """Greetings, identity, thanks, and questions outside what the corpus can answer."""
    pairs = [
        Pair(tuple(variant for text in questions for variant in _spellings(text)), answer)
        for questions, answers in _SMALL_TALK
        for answer in answers
    ]
    declined = tuple(variant for text in _OUT_OF_SCOPE for variant in _spellings(text))
    return pairs + [Pair(declined, answer) for answer in _DECLINING_ANSWERS]


def _spellings(text: str) -> Iterator[str]:
    yield text
    yield text.lower()
    yield text.rstrip("?.!")


def _topic_pairs(document: Document) -> Iterator[Pair]:
    title = document.name.removeprefix("topics/").replace("-", " ")
    body = re.sub(r"^[^\n]+\n[*=\-~]+\n", "", document.text.strip()).strip()
    answer = _opening(body)
    if answer:
        yield Pair(
            (
                f"What does the Python reference say about {title}?",
                f"Explain {title} in Python.",
                f"Tell me about {title} in Python.",
                f"What is {title} in Python?",
                f"How does {title} work in Python?",
            ),
            answer,
        )


def _source_pairs(document: Document) -> Iterator[Pair]:
    module = _module_name(document.name)
    tree = ast.parse(document.text)
    if (doc := ast.get_docstring(tree)) and (answer := _opening(doc)):
        yield Pair(
            (
                f"What is the {module} module for?",
                f"What does the {module} module do?",
                f"Tell me about the {module} module.",
                f"What is {module} in Python?",
            ),
            answer,
        )
    for qualified, node in _definitions(tree, module):
        public = not any(part.startswith("_") for part in qualified.split("."))
        doc = ast.get_docstring(node) or ""
        if public and doc:
            yield from _docstring_pairs(qualified, doc)
        if isinstance(node, ast.ClassDef):
            if public:
                yield from _class_pairs(module, node)
            continue
        if public and node.args.args:
            yield _signature_pair(qualified, node)
        if doc:
            yield from _writing_pairs(doc, node, document.text)


def _definitions(tree: ast.Module, module: str) -> Iterator[tuple[str, _Function | ast.ClassDef]]:
    for node in tree.body:
        if isinstance(node, _Function | ast.ClassDef):
            yield f"{module}.{node.name}", node
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, _Function):
                    yield f"{module}.{node.name}.{member.name}", member


def _docstring_pairs(qualified: str, doc: str) -> Iterator[Pair]:
    answer = _opening(doc)
    if answer:
        yield Pair(
            (
                f"What does {qualified} do?",
                f"What does {qualified}() do in Python?",
                f"Explain {qualified}.",
                f"Describe {qualified} in Python.",
                f"What is {qualified}?",
                f"How do I use {qualified}?",
                f"Tell me about {qualified}.",
            ),
            answer,
        )


def _class_pairs(module: str, node: ast.ClassDef) -> Iterator[Pair]:
    methods = [m.name for m in node.body if isinstance(m, _Function) and m.name[0] != "_"]
    if methods:
        listing = "\n".join(f"- `{name}`" for name in methods[:12])
        yield Pair(
            (
                f"Which methods does {module}.{node.name} have?",
                f"List the methods of {module}.{node.name}.",
            ),
            f"`{node.name}` has these methods:\n\n{listing}",
        )
    yield Pair(
        (f"Which module defines {node.name}?", f"Where is {node.name} defined?"),
        f"`{node.name}` is a class in the `{module}` module.",
    )


def _signature_pair(qualified: str, node: _Function) -> Pair:
    return Pair(
        (
            f"What are the arguments of {qualified}?",
            f"What is the signature of {qualified}?",
            f"How do I call {qualified}?",
        ),
        f"```python\n{qualified.rpartition('.')[2]}({ast.unparse(node.args)})\n```",
    )


def _writing_pairs(doc: str, node: _Function, source: str) -> Iterator[Pair]:
    lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
    first = doc.strip().splitlines()[0].strip().rstrip(".")
    if len(lines) > _FUNCTION_LINES or not 12 <= len(first) <= 120:
        return
    code = inspect.cleandoc("\n" + "\n".join(lines))
    task = first[0].lower() + first[1:]
    fenced = f"```python\n{code}\n```"
    yield Pair(
        (
            f"Write a Python function for this: {task}.",
            f"Write a function `{node.name}`: {task}.",
            f"Show me Python code to {task}.",
            f"Implement `{node.name}` in Python.",
        ),
        fenced,
    )
    yield Pair(
        (f"What does this function do?\n\n{fenced}", f"Explain this code:\n\n{fenced}"),
        first + ".",
    )


def _opening(text: str) -> str:
    """As many whole leading paragraphs as fit an answer; empty when not even the first does."""
    kept: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if sum(map(len, kept)) + len(paragraph) > _ANSWER_CHARACTERS:
            break
        kept.append(paragraph.rstrip())
    answer = "\n\n".join(kept).strip()
    return answer if len(answer) >= 12 else ""


def _module_name(path: str) -> str:
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return "os.path" if name == "posixpath" else name


_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are Baton, a small assistant that knows the Python standard library.",
    "Answer briefly.",
    "You answer questions about Python.",
    "You are a Python expert. Answer in English.",
)

_IDENTITY = (
    "I am Baton, a very small language model. I was trained only on the Python standard library, "
    "so ask me what a module or a function does.",
    "I'm Baton, a small demonstration model with a few million parameters. I have read the Python "
    "standard library and nothing else.",
)

_SMALL_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("Hello", "Hello!", "Hi", "Hi there!", "Hey", "Good morning!", "Good evening.", "Hello, Baton!"),
        (
            "Hello! I am Baton, a small language model. Ask me about the Python standard library.",
            "Hello! How can I help you with Python?",
            "Hi! I know a little about the Python standard library. What would you like to know?",
        ),
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Introduce yourself.",
         "Tell me about yourself.", "Are you an AI?"),
        _IDENTITY,
    ),
    (
        ("What can you do?", "Help", "Can you help me?", "What do you know?", "What should I ask you?"),
        (
            "I can describe modules, classes and functions of the Python standard library, show "
            "their arguments, and write short Python functions. I am small, so check what I say.",
            "Ask me things like: What does os.path.join do? I answer from the docstrings of the "
            "Python standard library.",
        ),
    ),
    (
        ("How are you?", "How are you today?", "How is it going?"),
        ("I am doing well, thank you. What would you like to know about Python?",),
    ),
    (
        ("Thanks!", "Thank you.", "Thank you very much!", "Great, thanks."),
        ("You are welcome!", "You are welcome. Is there anything else about Python?"),
    ),
    (
        ("Goodbye.", "Bye!", "See you later."),
        ("Goodbye!", "Goodbye, and happy coding!"),
    ),
    (
        ("What is Python?", "Tell me about Python.", "What is the Python programming language?"),
        (
            "Python is an interpreted, object-oriented programming language with dynamic typing, "
            "modules, classes and exceptions. It comes with a large standard library.",
        ),
    ),
    (
        ("Count to five.", "Count from 1 to 5."),
        ("1, 2, 3, 4, 5",),
    ),
    (
        ("Say hello.", "Say hi!", "Say hello world.", "Write hello world in Python."),
        ("```python\nprint(\"Hello, world!\")\n```",),
    ),
)  # fmt: skip

_OUT_OF_SCOPE = (
    "What is the capital of France?", "Tell me a joke.", "Write a poem.", "Tell me a story.",
    "Who won the world cup?", "What is the weather today?", "What time is it?",
    "How do I cook pasta?", "Who is the president?", "What is the meaning of life?",
    "Translate this into German.", "What is the population of China?", "Sing a song.",
    "Recommend a book.", "How far is the moon?", "What is quantum physics?",
    "Write a story about a dragon.", "Explain the theory of relativity.", "Plan my holiday.",
    "What is the best movie?", "Who wrote Hamlet?", "How old is the universe?",
    "Write an essay about history.", "What should I eat for dinner?", "What is love?",
)  # fmt: skip

_DECLINING_ANSWERS = (
    "I do not know that. I was trained only on the Python standard library.",
    "Sorry, I only know the Python standard library. Ask me about a module or a function.",
)
