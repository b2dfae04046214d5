"""Vocabularies of single characters: nanoGPT's meta.pkl, and characters.json of our own.

meta.pkl is a pickle, which could run anything when it is unpickled. It is read here by a reader of
its own, which knows dictionaries, lists, texts and numbers, and executes nothing.
"""

import hashlib
import json
import pickletools
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from gptfast import checks

META_PKL, CHARACTERS_JSON = "meta.pkl", "characters.json"
# 65,536 characters take 1.7 MB.
MAX_META_BYTES = 1 << 21
MAX_CHARACTERS = 65536
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_EMPTY: dict[str, type] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class CharacterTokenizer:
    """Each character is a token; there is no end-of-text, so `eot` is an id that no text has."""

    def __init__(self, name: str, characters: Sequence[str]) -> None:
        self.name, self.characters = name, tuple(characters)
        self.n_vocab = self.eot = len(self.characters)
        self._ids = {character: i for i, character in enumerate(self.characters)}

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the characters in the order of their ids, in hexadecimal."""
        return hashlib.sha256(json.dumps(["characters", *self.characters]).encode()).hexdigest()

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Return the ids of a text. Raises ValueError for a character that has none."""
        checks.text("the text", text)
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            at = text.index(error.args[0])
            known = "".join(self.characters[:80]) + ("…" if self.n_vocab > 80 else "")
            raise ValueError(
                f"the text has {error.args[0]!r} at {at}, which is not one of the {self.n_vocab} "
                f"characters of {self.name}: {known!r}"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        for i in ids:
            if not 0 <= i < self.n_vocab:
                raise IndexError(f"token id {i} is out of range for {self.n_vocab} characters")
        return "".join(self.characters[i] for i in ids)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return self.decode(ids).encode()

    def transformers_files(self) -> dict[str, str]:
        """Return the file that keeps it beside a model; transformers has no such tokenizer."""
        return {CHARACTERS_JSON: characters_json(self)}


def characters_file(directory: Path) -> Path | None:
    """Return the file of a directory that has a vocabulary of characters; None without one."""
    paths = (directory / name for name in (CHARACTERS_JSON, META_PKL))
    return next((path for path in paths if path.is_file()), None)


def read_characters(path: Path) -> CharacterTokenizer:
    """Return the tokenizer in a meta.pkl or characters.json, named after its directory.

    Nothing is unpickled. Raises ValueError for anything but a vocabulary of single characters.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_META_BYTES + 1)
        if len(content) > MAX_META_BYTES:
            raise ValueError(f"it has more than {MAX_META_BYTES} bytes")
        meta = json.loads(content) if path.name == CHARACTERS_JSON else read_pickle(content)
        characters = _characters(meta)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is no vocabulary of characters: {error}; name the tokenizer of the data "
            "(--tokenizer) and move this file away"
        ) from None
    return CharacterTokenizer(str(path.parent.resolve()), characters)


def characters_json(tokenizer: CharacterTokenizer) -> str:
    """Return the text of characters.json for a tokenizer."""
    stoi = {character: i for i, character in enumerate(tokenizer.characters)}
    return json.dumps({"vocab_size": tokenizer.n_vocab, "stoi": stoi}) + "\n"


def _characters(meta: Any) -> list[str]:
    """Return the characters in the order of their ids, from nanoGPT's vocab_size, stoi and itos."""
    stoi = meta.get("stoi") if isinstance(meta, dict) else None
    if not isinstance(stoi, dict):
        raise ValueError("it has no 'stoi', the id of each character")
    for token, i in stoi.items():
        if not isinstance(token, str) or type(i) is not int:
            raise ValueError(f"stoi has {_shown(token)}: {_shown(i)}, not a character and its id")
        if len(token) != 1 or "\ud800" <= token <= "\udfff":
            raise ValueError(f"stoi has {_shown(token)}, which is not one character")
    n = len(stoi)
    if not 1 <= n <= MAX_CHARACTERS or sorted(stoi.values()) != list(range(n)):
        raise ValueError(f"the ids of its {n} characters are not 0 to {n - 1}, each once")
    if meta.get("vocab_size", n) != n:
        size = _shown(meta["vocab_size"])
        raise ValueError(f"its vocab_size is {size}, but stoi has {n} characters")
    characters = sorted(stoi, key=stoi.__getitem__)
    itos = meta.get("itos", dict(enumerate(characters)))
    if isinstance(itos, list | tuple):
        itos = dict(enumerate(itos))
    if itos != dict(enumerate(characters)):
        raise ValueError("its itos and stoi contradict each other")
    return characters


def _shown(value: Any) -> str:
    """Return a value for a message: the type of a container, which may be endless when written."""
    return f"{value!r:.40}" if isinstance(value, str | int) else type(value).__name__


def read_pickle(content: bytes) -> Any:
    """Return the dictionaries, lists, texts and numbers in a pickle, without unpickling it.

    Raises ValueError for damaged bytes, and for a pickle that asks for anything else.
    """
    reader = _PickleReader()
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                return reader.result()
            reader.take(opcode.name, argument)
    except (LookupError, TypeError, UnicodeError, OverflowError, ValueError) as error:
        raise ValueError(f"it is damaged or no plain data ({error})") from None
    raise ValueError("it is damaged: it has no end")


class _PickleReader:
    """Follows the operations of a pickle, of which it knows those of plain data."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []  # how long the stack was at each
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        """Return the value of the whole pickle."""
        (value,) = self._stack
        return value

    def take(self, name: str, argument: Any) -> None:
        """Follow one operation. Raises ValueError for one that plain data does not need."""
        if name in ("PROTO", "FRAME"):
            return
        if name in _VALUES:
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self._stack.append(_EMPTY[name]())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        elif name == "MARK":
            self._marks.append(len(self._stack))
        else:
            self._collect(name)

    def _collect(self, name: str) -> None:
        """Follow an operation that makes or fills a container."""
        stack = self._stack
        if name in _TUPLES:
            n = _TUPLES[name]
            stack[-n:] = [tuple(stack[-n:])]
        elif name in ("SETITEM", "APPEND"):
            n = 2 if name == "SETITEM" else 1
            items = stack[-n:]
            del stack[-n:]
            self._fill(items)
        elif name in ("SETITEMS", "APPENDS"):
            self._fill(self._since_mark())
        elif name in ("DICT", "LIST", "TUPLE"):
            items = self._since_mark()
            if name == "TUPLE":
                stack.append(tuple(items))
            else:
                stack.append({} if name == "DICT" else [])
                self._fill(items)
        else:
            raise ValueError(f"it asks for {name}, which plain data does not")

    def _fill(self, items: list[Any]) -> None:
        """Add items to the container on top of the stack."""
        target = self._stack[-1]
        if isinstance(target, dict):
            # Tuples that share their parts are small here, but take for ever to hash.
            if bad := [key for key in items[::2] if not isinstance(key, str | int)]:
                raise ValueError(f"it has a {type(bad[0]).__name__} as a key")
            target.update(zip(items[::2], items[1::2], strict=True))
        elif isinstance(target, list):
            target += items
        else:
            raise ValueError(f"it fills a {type(target).__name__}")

    def _since_mark(self) -> list[Any]:
        at = self._marks.pop()
        items = self._stack[at:]
        del self._stack[at:]
        return items
