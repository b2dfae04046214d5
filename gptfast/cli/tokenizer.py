"""`gptfast tokenizer`: learn a vocabulary from text."""

from dataclasses import dataclass

from gptfast.cli.ranges import check_whole
from gptfast.data.documents import find_files, read_documents
from gptfast.tokenizer.train import MAX_VOCABULARY, MIN_VOCABULARY, train_tokenizer


@dataclass(frozen=True)
class TrainTokenizer:
    """Learn a byte-pair encoding from text (needs pip install tokenizers).

    gptfast tokenizer --data books/ --out vocabularies/books --vocab-size 8192

    gptfast train --data books/ --tokenizer vocabularies/books --out runs/books
    """

    data: tuple[str, ...]
    """The text: files of text or of records (.jsonl, .json, .csv, .parquet), directories, globs
    such as 'books/*.txt', or - for standard input. docs/data.md has all kinds."""
    out: str
    """The directory to create, with vocab.bpe and encoder.json."""
    vocab_size: int = 8192
    """Number of tokens, at most 65,536. It includes the 256 bytes and end-of-text."""
    text_field: str = "text"
    """The field of a record (a .jsonl line, a row of a table) that holds the text."""
    split_on_eot: bool = False
    """Take <|endoftext|> written in a text as the end of a document, not as plain text."""

    def __post_init__(self) -> None:
        check_whole(self, "vocab_size", least=MIN_VOCABULARY, most=MAX_VOCABULARY)

    def run(self) -> None:
        if not self.data:
            raise ValueError("--data names no text to learn from; give files, directories or globs")
        files = find_files(self.data)
        texts = read_documents(files, text_field=self.text_field, split_on_eot=self.split_on_eot)
        tokenizer = train_tokenizer(texts, self.vocab_size, self.out)
        print(f"done: {tokenizer.n_vocab:,} tokens in {self.out}; use it as --tokenizer {self.out}")
