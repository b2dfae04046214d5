"""`gptfast prepare`: text files to a directory of token files, split into parts."""

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gptfast.checks import integer
from gptfast.data.documents import Fields, find_files
from gptfast.data.hub import is_hub
from gptfast.data.kinds import TOKEN_SUFFIXES
from gptfast.data.shards import ShardWriter, truncate_shards
from gptfast.data.streams import is_stream
from gptfast.data.token_files import Documents, TokenFiles, as_uint16, check_ratios, split_edges
from gptfast.data.tokenize import Encoded, tokenize
from gptfast.files import fsync, json_text, new_directory, temporary, write_files
from gptfast.tokenizer.bpe import Tokenizer, end_of_text, vocabulary

META_FORMAT = 1
VOCABULARY = "tokenizer"
"""The directory, beside the tokens, with the files of their vocabulary."""
PARTS = ("train", "val", "test")
# Tokens that are copied at a time from one part to another.
_COPY_TOKENS = 1 << 22


def _write_all(writer: ShardWriter, encoded: Iterable[Encoded]) -> tuple[int, bool]:
    """Write all ids to shards; return the number of documents, and whether they have prompts."""
    documents, prompted = 0, False
    for part in encoded:
        documents += part.documents
        tokens = as_uint16(part.tokens)
        prompted = len(part.starts) > 0
        if prompted:
            ends = np.append(part.starts[1:], len(part.tokens))
            spans = zip(part.starts.tolist(), part.completions.tolist(), ends.tolist(), strict=True)
            for start, completion, end in spans:
                writer.write_document(tokens[start:end], completion - start)
        else:
            writer.write(tokens)
    return documents, prompted


def _cut(source: TokenFiles | Documents, edges: Sequence[int], writer: ShardWriter) -> None:
    """Copy the part of a source between two edges to a writer."""
    part = source[edges[0] : edges[1]]
    if isinstance(part, Documents):
        for i in range(len(part)):
            tokens, completion = part.document(i)
            writer.write_document(tokens.numpy(), completion)
    else:
        for start in range(0, len(part), _COPY_TOKENS):
            writer.write(part[start : start + _COPY_TOKENS].tensor().numpy())


def _divide(
    shards: Sequence[Path], edges: Sequence[int], prompted: bool, shard_tokens: int
) -> dict[str, int]:
    """Turn shards of everything into shards of each part; return the tokens of each.

    Everything behind the first part is copied; then the shards are truncated to the first part.
    """
    source = Documents.open(shards) if prompted else TokenFiles(shards)
    n_train = int(source.starts[edges[1]]) if isinstance(source, Documents) else edges[1]
    tokens = {PARTS[0]: n_train}
    for name, *between in zip(PARTS[1:], edges[1:], edges[2:], strict=False):
        with ShardWriter(shards[0].parent, name, shard_tokens) as writer:
            _cut(source, between, writer)
        tokens[name] = writer.tokens
    truncate_shards(shards, n_train)
    return tokens


def _check(out: Path, tokenizer: Tokenizer, split: Sequence[float], workers: int | None) -> None:
    """Raise ValueError for arguments of `prepare` that cannot be used."""
    if tokenizer.n_vocab > 65536:
        raise ValueError(
            f"token files hold ids up to 65,535, but {tokenizer.name} has {tokenizer.n_vocab:,} "
            "tokens; train on the text itself, or choose a smaller vocabulary (--tokenizer)"
        )
    if len(split) > len(PARTS):
        raise ValueError(f"split takes one to three shares, got {len(split)} (--split)")
    check_ratios(split)
    if workers is not None:
        integer("workers", workers, least=1)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out} already exists; choose another directory or remove it")
    if out.is_dir():
        _check_replaceable(out)


def _check_replaceable(out: Path) -> None:
    """Raise OSError, before hours of work, for an empty directory that cannot be replaced."""
    aside = temporary(out)
    try:
        out.rename(aside)
        aside.rename(out)
    except OSError as error:  # a mounted disk, or another user's
        raise OSError(
            f"cannot replace {out}: {error.strerror}; choose a directory that does not exist"
        ) from None


def prepare(
    paths: Sequence[str | PathLike],
    out: str | PathLike,
    tokenizer: Tokenizer,
    *,
    split: Sequence[float] = (0.9, 0.1),
    text_field: str = "text",
    prompt_field: str = "prompt",
    completion_field: str = "completion",
    split_on_eot: bool = False,
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenise files of text or records, directories and globs into a directory of token files.

    paths: hf:NAME among them is a data set of the `datasets` library.
    out: gets train_000000.bin, …, val_…, test_…, .idx for prompts, meta.json, and tokenizer/ with a
    vocabulary that is not gpt2 or byte, all or nothing.
    split: one to three shares of the tokens or, for prompts, of the documents. The three fields and
    split_on_eot: as in `Fields`. shard_tokens: the most tokens per file. workers: threads, None for
    one per core. progress: whether to show a bar.

    Returns the number of documents, the tokens per part, and the files written. Raises ValueError
    for input or an `out` that cannot be used; OSError if `out` cannot be written.
    """
    out = Path(out).resolve()
    _check(out, tokenizer, split, workers)
    files = _text_files(paths)
    fields = Fields(text_field, prompt_field, completion_field, split_on_eot)
    try:
        with new_directory(out) as directory:
            writer = ShardWriter(directory, PARTS[0], shard_tokens)
            with writer, _bar(files, progress) as bar:
                encoded = tokenize(files, tokenizer, fields, workers, bar.update)
                documents, prompted = _write_all(writer, encoded)
            unit, n = ("documents", documents) if prompted else ("tokens", writer.tokens)
            tokens = _divide(writer.paths, split_edges(n, split, unit), prompted, shard_tokens)
            meta = {
                "format": META_FORMAT,
                **_keep_vocabulary(tokenizer, directory),
                "documents": documents,
                "tokens": tokens,
                "sources": [str(path) for path in files],
            }
            (directory / "meta.json").write_text(json_text(meta), "utf-8")
    except OSError as error:
        raise OSError(f"cannot write {out}: {error.strerror}; is there room for it?") from error
    return {"documents": documents, "tokens": tokens, "files": _files_in(out)}


def _files_in(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_file())


def _keep_vocabulary(tokenizer: Tokenizer, directory: Path) -> dict[str, Any]:
    """Return what meta.json says of a vocabulary, and write its files beside the tokens.

    gpt2 and byte are known by name.
    """
    texts: dict[str, str] = getattr(tokenizer, "transformers_files", dict)()
    if tokenizer.name not in ("gpt2", "byte") and texts:
        kept = directory / VOCABULARY
        kept.mkdir()
        write_files(kept, {}, texts)
        fsync(kept)
    return {
        "tokenizer": tokenizer.name,
        "vocabulary": vocabulary(tokenizer),
        "n_vocab": tokenizer.n_vocab,
        "eot": end_of_text(tokenizer),
    }


def _text_files(paths: Sequence[str | PathLike]) -> list[Path]:
    """Return the files that paths name. Raises ValueError for none, and for token files."""
    files = find_files(paths)
    if not files:
        raise ValueError("no text to prepare; give files, directories or globs (--data)")
    if tokens := [path for path in files if path.suffix in TOKEN_SUFFIXES]:
        raise ValueError(f"{tokens[0]} is a token file already; train on it as it is")
    return files


def _bar(files: Sequence[Path], progress: bool) -> tqdm:
    """Return a progress bar over the bytes of files, shown only in a terminal."""
    known = not any(is_hub(path) or is_stream(path) for path in files)
    n_bytes = sum(path.stat().st_size for path in files) if known else None
    return tqdm(total=n_bytes, unit="B", unit_scale=True, disable=None if progress else True)
