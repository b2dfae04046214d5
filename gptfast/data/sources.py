"""The data that --data names: text, prompts and completions, token files, prepared directories."""

import glob
import json
import logging
import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from gptfast.checks import reason
from gptfast.data.documents import Fields, find_files
from gptfast.data.embedded import embedded_text
from gptfast.data.kinds import TOKEN_SUFFIXES
from gptfast.data.prepare import META_FORMAT, PARTS, VOCABULARY
from gptfast.data.token_files import Documents, TokenFiles, open_tokens
from gptfast.data.tokenize import load_text
from gptfast.data.tokens import Source, as_tokens, check_vocabulary, split_tokens
from gptfast.tokenizer.bpe import Tokenizer, same_vocabulary, vocabulary
from gptfast.tokenizer.characters import CharacterTokenizer, characters_file, read_characters
from gptfast.weights.weights import tokenizer_in

_LOGGER = logging.getLogger(__name__)


def _read_meta(directory: Path) -> dict[str, Any]:
    """Return what a directory records of its tokens: meta.json of `prepare`, or nanoGPT's meta.pkl.

    {} if there is neither. "tokens" is None where they are not counted.
    """
    path = directory / "meta.json"
    if not path.is_file():
        characters = characters_file(directory)
        return _meta_of(read_characters(characters)) if characters else {}
    try:
        meta = json.loads(path.read_bytes())
        if meta["format"] != META_FORMAT:
            raise ValueError(f"format {meta['format']!r} is not {META_FORMAT}")
        found = {name: meta[name] for name in ("tokenizer", "n_vocab", "tokens")}
        return {**found, "vocabulary": meta.get("vocabulary")}
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be used ({reason(error)}); prepare the data again"
        ) from None


def _meta_of(characters: CharacterTokenizer) -> dict[str, Any]:
    return {
        "tokenizer": characters.name,
        "n_vocab": characters.n_vocab,
        "tokens": None,
        "vocabulary": vocabulary(characters),
    }


def _check_meta(directory: Path, meta: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Raise ValueError if tokens with this meta were made with another tokenizer.

    Where there is no meta, that is logged.
    """
    if not meta:
        _LOGGER.warning(
            "the token files in %s do not say which tokenizer made them; taking them for %s's",
            directory,
            tokenizer.name,
        )
        return
    if meta["vocabulary"] is None:  # the first version of prepare recorded the name alone
        same = (meta["tokenizer"], meta["n_vocab"]) == (tokenizer.name, tokenizer.n_vocab)
    else:
        same = bool(same_vocabulary(meta["vocabulary"], tokenizer))
    if not same:
        raise ValueError(
            f"{directory} was prepared with tokenizer {meta['tokenizer']} ({meta['n_vocab']} "
            f"tokens), not {tokenizer.name} ({tokenizer.n_vocab}), whose ids mean other text; use "
            "that tokenizer (--tokenizer), or prepare the text again with this one"
        )


def _part_files(path: str | PathLike) -> dict[str, list[Path]]:
    """Return a directory's *train*.bin, *val*.bin and *test*.bin; {} if it has none to train on."""
    parts: dict[str, list[Path]] = {}
    taken: set[Path] = set()
    if not os.path.isdir(path):
        return parts
    for name in PARTS:
        every = (p for suffix in TOKEN_SUFFIXES for p in Path(path).glob(f"*{name}*{suffix}"))
        found = {p for p in every if p.name[0] != "."} - taken
        if found and (parts or name == PARTS[0]):
            parts[name] = sorted(found)
            taken |= found
    return parts


def is_prepared(paths: Sequence[str | PathLike]) -> bool:
    """Return whether the paths are one directory with files for the parts of the data."""
    return len(paths) == 1 and bool(_part_files(paths[0]))


def _token_directory(paths: Sequence[str | PathLike]) -> Path | None:
    """Return the directory of token files that paths name, as such or file by file; else None."""
    if is_prepared(paths):
        return Path(paths[0])
    names = [name for path in paths for name in glob.glob(str(path)) or [str(path)]]
    parents = {Path(name).parent for name in names}
    every = all(Path(name).suffix in TOKEN_SUFFIXES and os.path.isfile(name) for name in names)
    return parents.pop() if every and len(parents) == 1 else None


def prepared_tokenizer(paths: Sequence[str | PathLike]) -> str | None:
    """Return the name of the tokenizer that made token files; None if that is not on record.

    A vocabulary that lies beside the tokens is taken from there. Raises ValueError for a directory
    that is no longer there.
    """
    directory = _token_directory(paths)
    name = _read_meta(directory).get("tokenizer") if directory else None
    if directory is None or name is None or not os.path.isabs(str(name)):
        return name
    if kept := tokenizer_in(directory / VOCABULARY):
        return kept
    if not os.path.isdir(name):
        raise ValueError(
            f"{directory} was prepared with the tokenizer in {name}, which is no longer there; "
            "name its new place (--tokenizer)"
        )
    return name


def _load_prepared(directory: Path, tokenizer: Tokenizer, split: Sequence[float]) -> list[Source]:
    """Return the parts of a directory with *train*.bin, checked against its meta.json, if any."""
    meta = _read_meta(directory)
    _check_meta(directory, meta, tokenizer)
    if len({path.suffix for files in _part_files(directory).values() for path in files}) > 1:
        raise ValueError(
            f"{directory} has tokens as .bin and as .npy, perhaps the same twice; name the files "
            "to train on"
        )
    counts = meta.get("tokens")
    opened = {name: open_tokens(files) for name, files in _part_files(directory).items()}
    for name, source in opened.items():
        n = len(source.span() if isinstance(source, Documents) else source)
        if counts is not None and counts.get(name) != n:
            raise ValueError(
                f"{directory} has {n} {name} tokens, but its meta.json says {counts.get(name)}; "
                "prepare the data again"
            )
        check_vocabulary(source, tokenizer)
    if gone := set(counts or ()) - set(opened):
        raise ValueError(
            f"{directory} has no {', '.join(gone)} files, but its meta.json names some; prepare "
            "the data again"
        )
    # Parts without files of their own are cut from the end of train, by their shares.
    sources: dict[str, Source] = dict(opened)
    shares = {name: s for name, s in zip(PARTS, split, strict=False)}
    cut = [name for name in shares if name == PARTS[0] or name not in sources]
    if len(cut) > 1:
        total = sum(shares[name] for name in cut) if len(cut) < len(split) else 1.0
        ratios = [shares[name] / total for name in cut]
        sources |= dict(zip(cut, split_tokens(sources[PARTS[0]], ratios), strict=True))
    return [sources[name] for name in PARTS if name in sources]


def load_part(
    paths: Sequence[str | PathLike], tokenizer: Tokenizer, part: str, **options: Any
) -> Source:
    """Return one part of prepared data, "train", "val" or "test"; of any other data, all of it.

    options: those of `load_data`. Raises ValueError as that does, and for a part that is not there.
    """
    sources = load_data(paths, tokenizer, (1.0,), **options)
    if len(paths) != 1 or not (files := _part_files(paths[0])):
        return sources[0]
    if part not in files:
        raise ValueError(f"{paths[0]} has no part {part}, only {', '.join(files)} (--part)")
    return sources[list(files).index(part)]


def load_data(
    paths: Sequence[str | PathLike],
    tokenizer: Tokenizer,
    split: Sequence[float] = (0.9, 0.1),
    *,
    text_field: str = "text",
    prompt_field: str = "prompt",
    completion_field: str = "completion",
    split_on_eot: bool = False,
) -> list[Source]:
    """Return the training part of the data that paths name, then validation and, if any, test.

    paths: files of text or of records (documents, with end-of-text between them, or prompts with
    completions), directories of them and globs; hf:NAME, a data set of the `datasets` library;
    .bin and .npy token files; or one directory with *train*.bin, whose *val*.bin and *test*.bin are
    taken as they are. Parts without files of their own are cut off by `split`. Without paths it is
    the embedded text. The three fields and split_on_eot: as in `Fields`.

    Raises ValueError for data that is missing, unreadable, of mixed kinds, or of another tokenizer.
    """
    if not paths:
        return split_tokens(as_tokens(embedded_text(), tokenizer), split)
    prepared = [path for path in paths if _part_files(path)]
    if prepared and len(paths) > 1:
        raise ValueError(
            f"{prepared[0]} is a directory of token files; give it alone, or name the files"
        )
    if prepared:
        return _load_prepared(Path(prepared[0]), tokenizer, split)
    for path in filter(os.path.isdir, paths):
        if tokens := sorted(p for p in Path(path).glob("[!.]*") if p.suffix in TOKEN_SUFFIXES):
            raise ValueError(
                f"{path} has token files such as {tokens[0].name}, but no *train*.bin; name the "
                f"files to train on, for example {Path(path) / ('*' + tokens[0].suffix)} for all "
                "of them"
            )
    files = find_files(paths)
    token_files = [path for path in files if path.suffix in TOKEN_SUFFIXES]
    if not token_files:
        fields = Fields(text_field, prompt_field, completion_field, split_on_eot)
        return split_tokens(load_text(files, tokenizer, fields), split)
    if len(token_files) < len(files):
        text = next(path for path in files if path.suffix not in TOKEN_SUFFIXES)
        raise ValueError(
            f"{token_files[0]} holds tokens, but {text} holds text; give one kind at a time"
        )
    return split_tokens(_open_files(token_files, tokenizer), split)


def _open_files(files: Sequence[Path], tokenizer: Tokenizer) -> TokenFiles | Documents:
    """Return token files that were named one by one, checked against what lies beside them."""
    for directory in dict.fromkeys(path.parent for path in files):
        _check_meta(directory, _read_meta(directory), tokenizer)
    source = open_tokens(files)
    check_vocabulary(source, tokenizer)
    return source
