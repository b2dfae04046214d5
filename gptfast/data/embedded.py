"""The text to train on when no data is given: English prose that every CPython carries."""

import ast
import functools
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Modules that some distributions of CPython leave out, and files that a build generates: without
# them the text is the same wherever the same Python is installed.
SKIPPED = frozenset(
    ("__phello__", "config", "distutils", "ensurepip", "idlelib", "lib2to3", "msilib")
    + ("pydoc_data", "site-packages", "test", "tests", "tkinter", "turtledemo")
)
MIN_WORDS = 8
"""A shorter run of sentences is mostly a title or a fragment."""
MIN_LETTERS_SHARE = 0.9
"""The share of a sentence's words that have two small letters in a row, as code seldom has."""

_COMMENT = re.compile(r"[ \t]*#(?!!) ?(.*)")
_MARKUP = re.compile(r":[a-z:]+:(?=`)|`|\*(?=\w)|(?<=\w)\*|\[\d+\]")
_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z])")
# A word or a number of plain English in quotes, brackets and punctuation; names of code, with
# underscores, dots or calls in them, are none.
_WORD = re.compile(
    r"""[("']*(?:[A-Z]?[a-z]+(?:'[a-z]+)?|[A-Z]{1,5}|\d{1,4})(?:-[A-Za-z]?[a-z]+)*[)"'.,;:?!]*"""
)
_SMALL_LETTERS = re.compile(r"[a-z]{2}|[aAI]")


@functools.cache
def embedded_text() -> str:
    """Return about 670 kilobytes of English: the prose that explains Python, in Python itself.

    It is the plain sentences of the topics of `help()` and of the docstrings and comments of the
    standard library's source files, a paragraph a line. Code, tables and repeated paragraphs are
    left out. The documents that the paragraphs come from are shuffled, so that a part cut from the
    end is a fair sample of the whole. A given Python gives the same text each time.
    """
    documents = dict(_documents())
    names = sorted(documents)
    random.Random(0).shuffle(names)
    seen: set[str] = set()
    return "\n".join(p for name in names for p in _paragraphs(documents[name], seen))


def _documents() -> Iterator[tuple[str, str]]:
    """Yield the name and text of each topic, docstring and block of comment lines."""
    from pydoc_data.topics import topics

    yield from topics.items()
    library = Path(sysconfig.get_path("stdlib"))
    for path in library.rglob("*.py"):
        name = path.relative_to(library)
        top = name.parts[0].removesuffix(".py")
        if top in sys.stdlib_module_names and SKIPPED.isdisjoint((top, *name.parts)):
            source = path.read_bytes()
            for line, text in (*_docstrings(ast.parse(source)), *_comments(source)):
                yield f"{name.as_posix()}:{line}", text


def _docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
) -> Iterator[tuple[int, str]]:
    """Yield the line and text of every docstring of a module and of what it defines."""
    if text := ast.get_docstring(node):
        yield node.body[0].lineno, text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)


def _comments(source: bytes) -> Iterator[tuple[int, str]]:
    """Yield the line and text of every comment of two or more lines."""
    block: list[str] = []
    for number, line in enumerate([*source.decode("utf-8", "replace").splitlines(), ""]):
        if comment := _COMMENT.fullmatch(line):
            block.append(comment[1])
        else:
            if len(block) > 1:
                yield number, "\n".join(block)
            block = []


def _paragraphs(text: str, seen: set[str]) -> Iterator[str]:
    """Yield the runs of plain sentences in a text, on one line each, and add them to `seen`."""
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(_MARKUP.sub("", block.replace("\u2019", "'")).split())
        run: list[str] = []
        for sentence in [*_SENTENCE_END.split(paragraph), ""]:
            if _is_plain(sentence.split()):
                run.append(sentence)
                continue
            joined = " ".join(run)
            if len(joined.split()) >= MIN_WORDS and joined not in seen:
                seen.add(joined)
                yield joined
            run = []


def _is_plain(words: list[str]) -> bool:
    """Whether the words are a whole sentence of English."""
    if not (words and words[0].lstrip("(\"'")[:1].isupper() and words[-1][-1] in ".!?:\"')"):
        return False
    letters = sum(bool(_SMALL_LETTERS.search(word)) for word in words)
    return letters >= MIN_LETTERS_SHARE * len(words) and all(map(_WORD.fullmatch, words))
