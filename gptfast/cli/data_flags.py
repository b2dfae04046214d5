"""The flags that say how documents are read, which the commands with --data share."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the files that --data names are read."""

    text_field: str = "text"
    """The field of a record (a .jsonl line, a row of a table) that holds the text."""
    prompt_field: str = "prompt"
    """The field of a record that holds the prompt; "none" reads texts although there is one."""
    completion_field: str = "completion"
    """The field of a record that holds the completion."""
    split_on_eot: bool = False
    """Take <|endoftext|> written in a text as the end of a document, not as plain text."""

    def reading(self) -> dict[str, Any]:
        """Return these flags as options of `load_data` and `prepare`."""
        names = ("text_field", "prompt_field", "completion_field", "split_on_eot")
        return {name: getattr(self, name) for name in names}
