"""Vocabularies of single characters: nanoGPT's meta.pkl, and characters.json of our own.

meta.pkl is a pickle, which could run anything when it is unpickled. It is read as data by
gptfast/inert.py, which imports and executes nothing.
"""

import hashlib
import io
import json
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from gptfast import checks, inert

META_PKL, CHARACTERS_JSON = "meta.pkl", "characters.json"
# 65,536 characters take 1.7 MB.
MAX_META_BYTES = 1 << 21
MAX_CHARACTERS = 65536


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
    meta = inert.mapping_of(meta) or {}
    stoi = inert.mapping_of(meta.get("stoi"))
    if stoi is None:
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
    if isinstance(itos, inert.Inert) and not itos.attributes:
        raise ValueError(
            f"its itos is {inert.kind_of(itos)}; write the file again with a dictionary of "
            "texts and numbers, or without itos"
        )
    if inert.mapping_of(itos) != dict(enumerate(characters)):
        raise ValueError("its itos and stoi contradict each other")
    return characters


def _shown(value: Any) -> str:
    """Return a value for a message: the type of a container, which may be endless when written."""
    plain = isinstance(value, str | int | float)
    return f"{value!r:.40}" if plain else inert.kind_of(value)


def read_pickle(content: bytes) -> Any:
    """Return the dictionaries, lists, texts and numbers in a pickle, without unpickling it.

    Numbers and texts of NumPy's and dictionaries such as OrderedDict are read as Python's own;
    other objects are `Inert`. Raises ValueError for damaged bytes, and for a pickle that asks for a
    module such as os.
    """
    try:
        return inert.read_pickle(io.BytesIO(content), inert.PLAIN_CALLS, _outside)
    # Whatever a damaged or hostile pickle makes the machine and pickletools raise.
    except Exception as error:
        raise ValueError(f"it is damaged or no plain data ({checks.one_line(error)})") from None


def _outside(identifier: Any) -> Any:
    raise ValueError("it names something outside the file")
