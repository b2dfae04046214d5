"""Records as texts or as prompts with completions, by the names of their fields."""

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gptfast.tokenizer.bpe import END_OF_TEXT

# A NUL is a character like any other, but a text with a larger share of them is binary: in UTF-16
# without a byte-order mark every second byte of English is NUL, and one in some fifteen of Russian.
MAX_NUL_SHARE = 0.01
# Characters of a field's name that a message tells to type.
MAX_NAME = 60
QUESTION, ANSWER = "Q: ", "\nA:"
"""What `gptfast chat` puts before and after a prompt if no --template is given."""
NO_FIELD = "none"
"""The name of a prompt's field by which a record's text is read although it has a prompt."""
_USERS, _MODELS = ("user", "human", "prompter"), ("assistant", "gpt", "model", "bot", "chatbot")
_CHATS = ("messages", "conversations")
_INSTRUCTION = ("instruction", "output")
# Names that others give to a prompt and its completion, for the hint of an error.
_PROMPTS = ("prompt", "instruction", "question", "input", "query", "source", "user")
_COMPLETIONS = (
    *("completion", "output", "response", "answer", "answers", "target", "chosen", "reply"),
    *("assistant", "summary"),
)
_TEXTS = ("text", "content", "story", "body", "document", "article", "raw_content", "sentence")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fields:
    """How documents are read: the names of a record's fields, and what ends a document.

    text, prompt, completion: the fields with a record's text, or its prompt and completion.
    split_on_eot: whether <|endoftext|> written in a text separates documents.
    """

    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    split_on_eot: bool = False

    @property
    def names_text(self) -> bool:
        """Whether another field than "text" was named for texts."""
        return self.text != "text"

    @property
    def names_prompt(self) -> bool:
        """Whether other fields than "prompt" and "completion" were named."""
        return (self.prompt, self.completion) != ("prompt", "completion")

    @property
    def of_rows(self) -> frozenset[str]:
        """The fields by which an object is a record, and no wrapper around a list of them."""
        return frozenset((self.text, self.prompt, self.completion, "instruction", *_CHATS))

    @property
    def of_tables(self) -> frozenset[str]:
        """The columns by which the first line of a text is that of a table."""
        return frozenset((self.text, self.prompt, self.completion, *_TEXTS))

    def prompted(self, row: Collection[str]) -> bool:
        """Return whether a row with these fields is to be read as a prompt with a completion."""
        if self.names_prompt and not self.names_text:
            return self.prompt != NO_FIELD
        return self.prompt in row and (self.names_prompt or not self.names_text)

    def may_be_known(self, row: Collection[str]) -> bool:
        """Return whether a row with these fields may be a chat or an instruction.

        Its text, if it has one, is the same again in the words of somebody's template.
        """
        if self.names_text or self.names_prompt or {self.prompt, self.completion} <= set(row):
            return False
        return set(_INSTRUCTION) <= set(row) or any(name in row for name in _CHATS)

    def read_of(self, row: Collection[str]) -> list[str]:
        """Return the names of the fields that are read of a row with these."""
        return [self.prompt, self.completion] if self.prompted(row) else [self.text]


@dataclass(frozen=True, slots=True)
class Record:
    """A document, a piece of one, or a prompt with its completion as the text."""

    text: str
    first: bool = True  # False for a further piece of the same document
    prompt: str | None = None


@dataclass
class Notes:
    """What is to be said once about the data, after or while it is read."""

    separators: int = 0
    """How many times end-of-text was written in texts that were read as they are."""
    said: set[str] = field(default_factory=set)

    def say(self, key: str, line: str, *values: object) -> None:
        """Log a line if none with this key was logged before."""
        if key not in self.said:
            self.said.add(key)
            _LOG.warning(line, *values)

    def finish(self) -> None:
        """Log what was counted."""
        if self.separators:
            _LOG.warning(
                "the data has %s written in it %s, which was read as plain text; with "
                "--split-on-eot it separates documents",
                END_OF_TEXT,
                times(self.separators),
            )


def times(n: int) -> str:
    """Return a count in words: "1 time", "2 times"."""
    return f"{n:,} time{'' if n == 1 else 's'}"


def records(where: str, row: Any, fields: Fields, notes: Notes) -> Iterator[Record]:
    """Yield what one row of a file holds. Raises ValueError for a row that cannot be used."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object with a field {fields.text!r}")
    if fields.may_be_known(row) and (pairs := _known_form(where, row, fields, notes)):
        for prompt, completion in pairs:
            yield from _prompted(prompt, completion, fields, notes)
        return
    own = fields.read_of(row)
    say_fields(where, row, own, notes)
    if fields.prompted(row):
        texts = [_field(where, row, name, fields) for name in (fields.prompt, fields.completion)]
        if row.get("input") and "input" not in own:
            notes.say("input", "%s: its 'input' is not read; put it into the prompt", where)
        yield from _prompted(texts[0], texts[1], fields, notes)
    else:
        found = [*divided(_field(where, row, fields.text, fields), True, fields, notes)]
        yield from [record for record in found if record.text] or found[:1]


def say_fields(where: str, names: Collection[str], read: list[str], notes: Notes) -> None:
    """Log once which fields of a record are not read."""
    if "fields" not in notes.said and set(read) < set(names):
        left = ", ".join(str(name) for name in names if name not in read)[:200]
        is_read = "is" if len(read) == 1 else "are"
        notes.say("fields", f"%s: %s {is_read} read, not %s", where, " and ".join(read), left)


def divided(text: str, first: bool, fields: Fields, notes: Notes) -> Iterator[Record]:
    """Yield a text as records: one, or those that end-of-text written in it separates."""
    if END_OF_TEXT not in text:
        yield Record(text, first)
    elif fields.split_on_eot:
        for i, part in enumerate(text.split(END_OF_TEXT)):
            yield Record(part, first or i > 0)
    else:
        notes.separators += text.count(END_OF_TEXT)
        yield Record(text, first)


def _prompted(prompt: str, completion: str, fields: Fields, notes: Notes) -> Iterator[Record]:
    if fields.split_on_eot:  # one follows the completion anyway
        completion = completion.removesuffix(END_OF_TEXT)
    notes.separators += prompt.count(END_OF_TEXT) + completion.count(END_OF_TEXT)
    yield Record(completion, prompt=prompt)


def _field(where: str, row: Mapping[str, Any], name: str, fields: Fields) -> str:
    """Return a field's text. Raises ValueError, with the flag that helps, if there is none."""
    if name not in row:
        names = [str(key) for key in row]
        only = ", ".join(names)[:200] or "none"
        raise ValueError(f"{where} has no field {name!r}, only {only}{_hint(names, name, fields)}")
    return _text(f"{where}: field {name!r}", row[name])


def _hint(names: list[str], name: str, fields: Fields) -> str:
    """Return which flags would read a record with these fields."""
    # A longer one is no name: the first line of a table without names is a row of it.
    names = [n for n in names if len(n) <= MAX_NAME]

    def known(candidates: tuple[str, ...]) -> str | None:
        return next((n for c in candidates for n in names if n.lower() == c), None)

    prompt, completion, text = known(_PROMPTS), known(_COMPLETIONS), known(_TEXTS)
    if name == fields.completion:
        others = [n for n in names if n != fields.prompt]
        text_too = f", or read {text} alone with --prompt-field none" if text else ""
        return f"; name it with --completion-field {completion or next(iter(others), '')}{text_too}"
    if prompt and completion and prompt != completion:
        return f"; name them with --prompt-field {prompt} --completion-field {completion}"
    if text or len(names) == 1:
        return f"; name it with --text-field {text or names[0]}"
    return "; name it with --text-field, or --prompt-field and --completion-field"


def _text(where: str, text: Any) -> str:
    """Return the value of a field. Raises ValueError unless it is a text as a file may have it."""
    if not isinstance(text, str):
        remedy = f"; a chat is one list in a field {_CHATS[0]!r}" if isinstance(text, list) else ""
        raise ValueError(f"{where} must be a string, got {text!r:.40}{remedy}")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{where} has half of a surrogate pair")
    if n_nuls := text.count("\0"):
        content = text.encode()
        if n_nuls > MAX_NUL_SHARE * len(content):
            raise ValueError(f"{where} {binary(content.index(0), n_nuls, len(content))}")
    return text


def binary(first: int, n_nuls: int, n_bytes: int) -> str:
    """Return what is wrong with a text of n_bytes bytes that has more NULs than a text may have."""
    return (
        f"is binary: it has a NUL byte at {first}, and {n_nuls} in {n_bytes} bytes are more than "
        f"1 in {1 / MAX_NUL_SHARE:.0f}; give UTF-8 text"
    )


def _known_form(
    where: str, row: Mapping[str, Any], fields: Fields, notes: Notes
) -> list[tuple[str, str]] | None:
    """Return the prompts and completions of a chat or an instruction; None for other rows."""
    text = f"; --prompt-field none reads {fields.text} instead" if fields.text in row else ""
    try:
        return _pairs(where, row, text, notes)
    except ValueError as error:
        raise ValueError(f"{error}{text}") from None


def _pairs(
    where: str, row: Mapping[str, Any], text: str, notes: Notes
) -> list[tuple[str, str]] | None:
    if set(_INSTRUCTION) <= row.keys():
        instruction, given, output = (
            _text(f"{where}: field {name!r}", "" if row.get(name) is None else row[name])
            for name in ("instruction", "input", "output")
        )
        beside = _beside(row, (*_INSTRUCTION, "input"))
        notes.say("instruction", _SAYS, where, " and ".join(_INSTRUCTION) + beside, text)
        asked = f"{instruction}\n{given}" if given else instruction
        return [(f"{QUESTION}{asked}{ANSWER}", f" {output}")]
    for name in _CHATS:
        if isinstance(row.get(name), list):
            notes.say("messages", _SAYS, where, f"{name}, a chat{_beside(row, (name,))}", text)
            return _chat(f"{where}: field {name!r}", row[name])
    return None


_SAYS = (
    f"%s has %s: read as prompts {QUESTION + '…' + ANSWER!r} with completions, which is how "
    "`gptfast chat` asks; --prompt-field and --completion-field read two fields as they are%s"
)


def _beside(row: Mapping[str, Any], read: Collection[str]) -> str:
    """Return which fields of a row are not read, in words for a message; "" for none."""
    left = ", ".join(str(name) for name in row if name not in read)[:200]
    return f" (not read: {left})" if left else ""


def _chat(where: str, messages: list[Any]) -> list[tuple[str, str]]:
    """Return each reply of a chat with all that was said before it.

    A reply of weight 0, as OpenAI's form has it, is among what was said, and none to learn.
    """
    said, pairs, before = "", [], ""
    for message in messages:
        role, content = _message(where, message)
        if role in _MODELS:
            if before not in _USERS:
                raise ValueError(f"{where} has a reply that follows no message of the user")
            said += ANSWER
            weight = message.get("weight", 1)
            if weight not in (0, 1, None):
                raise ValueError(f"{where} has a reply of weight {weight!r:.40}; give 0 or 1")
            if weight != 0:
                pairs.append((said, f" {content}"))
            said += f" {content}\n"
        elif role in _USERS:
            said += f"\n{content}" if before in _USERS else f"{QUESTION}{content}"
        elif role == "system" and before not in _USERS:
            said += f"{content}\n"
        else:
            raise ValueError(
                f"{where} has the role {role!r:.40} where it cannot be read; a chat has user and "
                "assistant in turn, after system if that is there"
            )
        before = role
    if not pairs:
        raise ValueError(f"{where} has no reply of the assistant to learn")
    return pairs


def _message(where: str, message: Any) -> tuple[str, str]:
    """Return the role and the text of a message, in OpenAI's form or ShareGPT's."""
    if isinstance(message, dict):
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(content, list):  # parts, of which text is one kind
            texts = [part.get("text") for part in content if isinstance(part, dict)]
            known = [text for text in texts if isinstance(text, str)]
            content = "".join(known) if len(known) == len(content) else None
        if isinstance(role, str) and isinstance(content, str):
            return role.lower(), _text(where, content)
    raise ValueError(f"{where} has a message without a role and a text: {message!r:.60}")
