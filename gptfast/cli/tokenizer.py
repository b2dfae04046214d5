"""`gptfast tokenizer`: learn a vocabulary from text."""

from dataclasses import dataclass

from gptfast.data.documents import find_files, read_documents
from gptfast.tokenizer.train import train_tokenizer


@dataclass(frozen=True)
class TrainTokenizer:
    """Learn a byte-pair encoding from text (needs pip install tokenizers).

    gptfast tokenizer --data books/ --out vocabularies/books --vocab-size 8192

    gptfast train --data books/ --tokenizer vocabularies/books --out runs/books
    """

    data: tuple[str, ...]
    """The text: UTF-8 text files, .jsonl files, directories, or globs such as 'books/*.txt'."""
    out: str
    """The directory to create, with vocab.bpe and encoder.json."""
    vocab_size: int = 8192
    """Number of tokens, at most 65,536. It includes the 256 bytes and end-of-text."""
    text_field: str = "text"
    """The field of a .jsonl line that holds the text."""

    def run(self) -> None:
        if not self.data:
            raise ValueError("--data names no text to learn from; give files, directories or globs")
        texts = read_documents(find_files(self.data), text_field=self.text_field)
        tokenizer = train_tokenizer(texts, self.vocab_size, self.out)
        print(f"done: {tokenizer.n_vocab:,} tokens in {self.out}; use it as --tokenizer {self.out}")
