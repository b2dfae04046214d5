"""`gptfast prepare`: text to token files."""

from dataclasses import dataclass

from gptfast.data.prepare import prepare
from gptfast.tokenizer.vocabulary import get_tokenizer


@dataclass(frozen=True)
class Prepare:
    """Turn text into token files that training maps into memory, end-of-text between documents.

    A document is a text file or a line of a .jsonl file: its text field, or its prompt and
    completion, of which only the completion is learnt.

    gptfast prepare --data books/ --out tokens/books --split 0.98 0.01 0.01

    gptfast prepare --data 'dialogues/*.jsonl' --out tokens/dialogues

    gptfast train --data tokens/books --out runs/books
    """

    data: tuple[str, ...]
    """UTF-8 text files, .jsonl files, directories or globs of them."""
    out: str
    """The directory to make: train_000000.bin and so on, and meta.json."""
    tokenizer: str = "gpt2"
    """gpt2, byte, or a directory with vocab.bpe and encoder.json."""
    split: tuple[float, ...] = (0.9, 0.1)
    """Shares of the tokens for training, validation and test; 1 for training alone."""
    text_field: str = "text"
    """The key of a document's text in .jsonl."""
    prompt_field: str = "prompt"
    """The key of an example's prompt in .jsonl, which is read but not learnt."""
    completion_field: str = "completion"
    """The key of what follows the prompt."""
    shard_tokens: int = 100_000_000
    """Tokens per file at most."""
    workers: int | None = None
    """Threads that encode (default one per core)."""

    def run(self) -> None:
        summary = prepare(
            self.data,
            self.out,
            get_tokenizer(self.tokenizer),
            split=self.split,
            text_field=self.text_field,
            prompt_field=self.prompt_field,
            completion_field=self.completion_field,
            shard_tokens=self.shard_tokens,
            workers=self.workers,
        )
        parts = ", ".join(f"{name} {n:,}" for name, n in summary["tokens"].items())
        print(f"{summary['documents']:,} documents; tokens: {parts}")
        print(f"done: try\n  gptfast train --data {self.out}")
