"""`gptfast prepare`: turn text into token files."""

from dataclasses import dataclass
from typing import ClassVar

from gptfast.cli.data_flags import Reading
from gptfast.cli.ranges import check_split, check_whole
from gptfast.data.prepare import prepare
from gptfast.data.token_files import MAX_FILE_TOKENS
from gptfast.tokenizer.vocabulary import get_tokenizer


@dataclass(frozen=True)
class Prepare(Reading):
    """Turn text into token files, which training reads without loading them into memory.

    A document is a text file, or a record: a line of a .jsonl file, a row of a table. Documents are
    separated by end-of-text. A record has either a text, or a prompt and a completion, and training
    learns to predict the completion only.

    gptfast prepare --data books/ --out tokens/books --split 0.98 0.01 0.01

    gptfast prepare --data 'dialogues/*.jsonl' --out tokens/dialogues

    gptfast train --data tokens/books --out runs/books
    """

    data: tuple[str, ...]
    """The text to tokenise: files of text or of records (.jsonl, .json, .csv, .parquet),
    directories, globs such as 'books/*.txt', hf:NAME:SPLIT:FIELD for a data set of the datasets
    library, or - for standard input. docs/data.md has all kinds."""
    out: str
    """The directory to create, with train_000000.bin and so on, and meta.json."""
    tokenizer: str = "gpt2"
    """gpt2, byte, or a directory with a vocabulary's files, such as tokenizer.json."""
    split: tuple[float, ...] = (0.9, 0.1)
    """Shares of the tokens for training, validation and test; 1 puts all into training."""
    shard_tokens: int = 100_000_000
    """The largest number of tokens per file."""
    workers: int | None = None
    """Number of threads that encode text (default: one per core)."""
    set_first: ClassVar = ("data", "out", "tokenizer", "split", "text_field")

    def __post_init__(self) -> None:
        check_whole(self, "workers")
        check_whole(self, "shard_tokens", most=MAX_FILE_TOKENS)
        check_split(self.split, least=1)

    def run(self) -> None:
        summary = prepare(
            self.data,
            self.out,
            get_tokenizer(self.tokenizer),
            split=self.split,
            **self.reading(),
            shard_tokens=self.shard_tokens,
            workers=self.workers,
        )
        parts = ", ".join(f"{name} {n:,}" for name, n in summary["tokens"].items())
        print(f"{summary['documents']:,} documents; tokens: {parts}")
        print(f"done: try\n  gptfast train --data {self.out}")
