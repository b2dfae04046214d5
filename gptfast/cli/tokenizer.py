"""`gptfast tokenizer`: learn a vocabulary from text."""

from dataclasses import dataclass

from gptfast.data.documents import find_files, read_documents
from gptfast.tokenizer.train import train_tokenizer


@dataclass(frozen=True)
class TrainTokenizer:
    """Learn a byte-pair encoding from text (needs pip install 'gptfast[tokenizers]').

    gptfast tokenizer --data books/ --out vocabularies/books --vocab-size 8192

    gptfast train --data books/ --tokenizer vocabularies/books --out runs/books
    """

    data: tuple[str, ...]
    """UTF-8 text files, .jsonl files (their text field), directories or globs of them."""
    out: str
    """The directory to make: vocab.bpe and encoder.json."""
    vocab_size: int = 8192
    """Number of tokens, 256 bytes and end-of-text among them; at most 65,536."""
    text_field: str = "text"
    """The key of a document's text in .jsonl."""

    def run(self) -> None:
        if not self.data:
            raise ValueError("no text to learn from; give files, directories or globs")
        texts = read_documents(find_files(self.data), text_field=self.text_field)
        tokenizer = train_tokenizer(texts, self.vocab_size, self.out)
        print(f"done: {tokenizer.n_vocab:,} tokens in {self.out}; use it as --tokenizer {self.out}")
