"""Documents to token files: tokenise in threads, write shards, split."""

import glob
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gptfast.data.documents import Fields, find_files
from gptfast.data.shards import ShardWriter, truncate_shards
from gptfast.data.token_files import Documents, TokenFiles, as_uint16, check_ratios, split_edges
from gptfast.data.tokenize import Encoded, tokenize
from gptfast.files import fsync
from gptfast.tokenizer.bpe import Tokenizer, vocabulary

FORMAT = 1
PARTS = ("train", "val", "test")
COPIED_TOKENS = 1 << 22


def _write_all(writer: ShardWriter, encoded: Iterable[Encoded]) -> tuple[int, bool]:
    """All ids into one row of shards; how many documents, and whether they have prompts."""
    documents, prompted = 0, False
    for part in encoded:
        documents += part.documents
        tokens = as_uint16(part.tokens)
        prompted = len(part.starts) > 0
        if prompted:
            ends = np.append(part.starts[1:], len(part.tokens))
            rows = zip(part.starts.tolist(), part.completions.tolist(), ends.tolist(), strict=True)
            for start, completion, end in rows:
                writer.write_document(tokens[start:end], completion - start)
        else:
            writer.write(tokens)
    return documents, prompted


def _cut(source: TokenFiles | Documents, edges: Sequence[int], writer: ShardWriter) -> None:
    """Copy what lies between two edges of the source."""
    part = source[edges[0] : edges[1]]
    if isinstance(part, Documents):
        for i in range(len(part)):
            tokens, completion = part.document(i)
            writer.write_document(tokens.numpy(), completion)
    else:
        for start in range(0, len(part), COPIED_TOKENS):
            writer.write(part[start : start + COPIED_TOKENS].tensor().numpy())


def _divide(
    shards: Sequence[Path], edges: Sequence[int], prompted: bool, shard_tokens: int
) -> dict[str, int]:
    """Turn shards of everything into those of each part; the tokens of each.

    Only what lies past the first part is copied: its shards are cut short, then, where they stand.
    """
    source = Documents.open(shards) if prompted else TokenFiles(shards)
    n_train = int(source.starts[edges[1]]) if prompted else edges[1]
    tokens = {PARTS[0]: n_train}
    for name, *between in zip(PARTS[1:], edges[1:], edges[2:], strict=False):
        with ShardWriter(shards[0].parent, name, shard_tokens) as writer:
            _cut(source, between, writer)
        tokens[name] = writer.tokens
    truncate_shards(shards, n_train)
    return tokens


def _check(out: Path, tokenizer: Tokenizer, split: Sequence[float], workers: int | None) -> None:
    if tokenizer.n_vocab > 65536:
        raise ValueError(
            f"token files hold ids up to 65535; {tokenizer.name} has {tokenizer.n_vocab} tokens"
        )
    if len(split) > len(PARTS):
        raise ValueError(f"split takes one to three shares, got {tuple(split)}")
    check_ratios(split)
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be >= 1, got {workers}")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out} already exists; choose another directory or remove it")


def prepare(
    paths: Sequence[str | PathLike],
    out: str | PathLike,
    tokenizer: Tokenizer,
    *,
    split: Sequence[float] = (0.9, 0.1),
    text_field: str = "text",
    prompt_field: str = "prompt",
    completion_field: str = "completion",
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenise text files, directories, globs and .jsonl into a new directory of token files.

    out gets train_000000.bin, …, val_…, test_… (split: one to three shares, of the tokens or, for
    prompts and completions, of the documents), sidecars .idx for prompts, and meta.json. It
    appears whole or not at all. Returns documents, tokens per part, and the files written.

    Raises ValueError for input that cannot be used, an `out` that has something in it and a
    vocabulary past 65,536; OSError where `out` cannot be written.
    """
    out = Path(out).resolve()
    _check(out, tokenizer, split, workers)
    files = find_files(paths)
    if not files:
        raise ValueError("no text to prepare; give files, directories or globs")
    if tokens := [path for path in files if path.suffix == ".bin"]:
        raise ValueError(f"{tokens[0]} holds tokens already; train on it as it is")
    n_bytes = sum(path.stat().st_size for path in files)
    fields = Fields(text_field, prompt_field, completion_field)
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        _remove_stale(out)
        temporary.mkdir(parents=True)
        with (
            tqdm(
                total=n_bytes, unit="B", unit_scale=True, disable=None if progress else True
            ) as bar,
            ShardWriter(temporary, PARTS[0], shard_tokens) as writer,
        ):
            encoded = tokenize(files, tokenizer, fields, workers, bar.update)
            documents, prompted = _write_all(writer, encoded)
        unit, n = ("documents", documents) if prompted else ("tokens", writer.tokens)
        tokens = _divide(writer.paths, split_edges(n, split, unit), prompted, shard_tokens)
        meta = {
            "format": FORMAT,
            "tokenizer": tokenizer.name,
            "vocabulary": vocabulary(tokenizer),
            "n_vocab": tokenizer.n_vocab,
            "eot": tokenizer.eot,
            "documents": documents,
            "tokens": tokens,
            "sources": [str(path) for path in files],
        }
        _publish(temporary, out, meta)
    except OSError as error:
        raise OSError(f"cannot write {out}: {error.strerror}; is there room for it?") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {"documents": documents, "tokens": tokens, "files": sorted(out.iterdir())}


def _remove_stale(out: Path) -> None:
    """Remove what a process that was killed, or had this one's number, left of the same out."""
    for temporary in out.parent.glob(f".{glob.escape(out.name)}.tmp-*"):
        number = temporary.name.rpartition("-")[2]
        if number.isdecimal() and not _is_another(int(number)):
            shutil.rmtree(temporary, ignore_errors=True)


def _is_another(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return process != os.getpid()


def _publish(temporary: Path, out: Path, meta: dict[str, Any]) -> None:
    """Give the finished directory its meta.json and its name."""
    (temporary / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", "utf-8")
    fsync(temporary / "meta.json")
    fsync(temporary)
    temporary.rename(out)
    fsync(out.parent)
