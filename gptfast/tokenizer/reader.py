"""The files of a vocabulary, in every form, read as one `Description`.

The forms are tokenizer.json, vocab.json with merges.txt, and OpenAI's encoder.json with vocab.bpe.
Beside each there may be tokenizer_config.json, special_tokens_map.json and added_tokens.json. They
mean what transformers 5 makes of them: its class GPT2Tokenizer takes vocabulary and merges and has
GPT-2's split and special tokens; its general class takes tokenizer.json as it is.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gptfast.checks import reason
from gptfast.tokenizer import template
from gptfast.tokenizer.added import MAX_IDS, AddedIds, AddedToken, parse_id
from gptfast.tokenizer.words import BYTE_SYMBOLS, Pair

END_OF_TEXT = "<|endoftext|>"
BPE_HEADER = "#version: 0.2"
# The files of a vocabulary, in the order in which they are looked for.
VOCABULARIES = (("tokenizer.json",), ("merges.txt", "vocab.json"), ("vocab.bpe", "encoder.json"))
# Files that say more about it.
CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
# So many tokens that no merge makes, and such a share of all, are a file that was cut off.
MIN_LOST, MAX_LOST_SHARE = 100, 0.1
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Names of end-of-text that are tried where no file says which it is.
_USUAL_ENDS = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "[EOS]")
_GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
_BACKENDS = ("TokenizersBackend", "PreTrainedTokenizerFast", "PreTrainedTokenizer", "PythonBackend")
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Description:
    """A vocabulary as its files describe it.

    vocab: ids of the tokens by name, written with BYTE_SYMBOLS, without added ones that it lacks.
    added: by id. eot: the id of end-of-text, None if nothing names it. before, after: ids around a
    text. texts: the files from which transformers makes the same tokenizer, {} for other forms.
    """

    vocab: dict[str, int]
    merges: list[Pair]
    added: dict[int, AddedToken] = field(default_factory=dict)
    eot: int | None = None
    bos: int | None = None
    unknown: int | None = None
    fused: bool = False
    whole_words: bool = False
    add_prefix_space: bool = False
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    texts: dict[str, str] = field(default_factory=dict)


def vocabulary_in(directory: Path) -> tuple[Path, ...]:
    """Return the files of a directory's vocabulary, as in VOCABULARIES; () if there is none."""
    for names in VOCABULARIES:
        if all((directory / name).is_file() for name in names):
            return tuple(directory / name for name in names)
    return ()


def read_directory(directory: Path) -> Description:
    """Return what a directory's files say. Raises ValueError for what does not fit."""
    return _Reader(directory).read()


def read_json(path: Path) -> dict[str, Any]:
    """Return a file's JSON object. Raises ValueError for another, and a name given twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"{twice[:80]!r} is in it more than once")
        return found

    try:
        found = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def check_ids(vocab: Any) -> dict[str, int]:
    """Return a vocabulary. Raises ValueError unless it is tokens and their ids, each id once."""
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise ValueError("it is not a JSON object of tokens and their ids")
    seen: dict[int, str] = {}
    for token, i in vocab.items():
        if not 0 <= i < MAX_IDS:
            raise ValueError(f"token {token[:80]!r} has id {i}; ids are 0 to {MAX_IDS - 1}")
        if i in seen:
            raise ValueError(f"tokens {seen[i][:80]!r} and {token[:80]!r} have the same id {i}")
        seen[i] = token
    return vocab


def read_merges(path: Path) -> list[Pair]:
    """Return the pairs of merges.txt or vocab.bpe, with any first line #version or none."""
    lines = path.read_bytes().decode("utf-8-sig").split("\n")
    lines = [line.removesuffix("\r") for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    merges: list[Pair] = []
    for number, line in enumerate(lines, 1):
        if number == 1 and line.startswith("#version"):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            raise ValueError(f"line {number}, {line[:80]!r}, does not merge two tokens")
        merges.append((parts[0], parts[1]))
    return merges


def check_merges(merges: Sequence[Pair], vocab: Mapping[str, int]) -> None:
    """Raise ValueError unless the vocabulary has the parts of each merge and what it makes."""
    for number, (a, b) in enumerate(merges, 1):
        for part in (a, b):
            if part not in vocab:
                raise ValueError(
                    f"merge {number}, {a[:40]!r} with {b[:40]!r}, does not merge two tokens of the "
                    f"vocabulary: it has no {part[:40]!r}"
                )
        if a + b not in vocab:
            raise ValueError(
                f"merge {number} makes {(a + b)[:80]!r}, which is not in the vocabulary"
            )


class _Reader:
    """Reads the files of one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = self._optional(CONFIG)
        model = self._optional("config.json")
        named = self.config.get("tokenizer_class") or model.get("tokenizer_class")
        self.model_eos = model.get("eos_token_id")
        if named is None:
            only_json = (directory / "tokenizer.json").is_file()
            self.is_gpt2 = model.get("model_type") == "gpt2" or not only_json
        elif named in _GPT2_CLASSES:
            self.is_gpt2 = True
        elif named in _BACKENDS:
            self.is_gpt2 = False
        else:
            raise ValueError(
                f"{directory / CONFIG} names the tokenizer {named!r:.80}, but gptfast reads "
                "GPT-2's byte-level BPE only"
            )

    def read(self) -> Description:
        files = vocabulary_in(self.directory)
        if not files:
            raise ValueError(f"{self.directory} has no vocabulary")
        if len(files) == 1:
            description, raw_added = self._tokenizer_json(files[0])
            self._compare(description)
        else:
            self.is_gpt2 = True  # only this class has these files
            description, raw_added = self._two_files(*files), []
        description = self._with_added(description, raw_added)
        say_unreachable(self.directory, description)
        description = replace(description, eot=self._end(description), bos=self._begin(description))
        if len(files) == 2:
            description = self._with_around(description)
        if files[0].name != "vocab.bpe":
            description = replace(description, texts=self._texts(files))
        return description

    def _optional(self, name: str) -> dict[str, Any]:
        """Return the JSON object of a file, {} if it is absent."""
        path = self.directory / name
        if not path.is_file():
            return {}
        try:
            return read_json(path)
        except ValueError as error:
            raise ValueError(f"{path} does not fit: {error}") from None

    def _two_files(self, merges_path: Path, vocab_path: Path) -> Description:
        path = vocab_path
        try:
            vocab = check_ids(read_json(vocab_path))
            path = merges_path
            merges = read_merges(merges_path)
            check_merges(merges, vocab)
        except ValueError as error:
            raise ValueError(
                f"{path} does not fit: {error}; give the two files of one tokenizer"
            ) from None
        prefix = self.config.get("add_prefix_space", False)
        return Description(vocab, merges, add_prefix_space=bool(prefix))

    def _tokenizer_json(self, path: Path) -> tuple[Description, list[dict[str, Any]]]:
        """Return what tokenizer.json says, and its added tokens as they stand there."""
        try:
            raw = read_json(path)
            return self._model(raw), list(raw.get("added_tokens") or ())
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"{path} does not fit: {reason(error)}") from None

    def _model(self, raw: dict[str, Any]) -> Description:
        model = raw["model"]
        if model.get("type", "BPE") != "BPE" or "merges" not in model:
            raise ValueError(f"its model is {model.get('type')}, not BPE")
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(name):
                raise ValueError(f"its model has {name} {model[name]!r:.40}, which GPT-2's has not")
        if raw.get("normalizer"):
            kind = raw["normalizer"].get("type")
            raise ValueError(f"it has the normalizer {kind}, and GPT-2's has none")
        in_file = template.check_pre_tokenizer(raw.get("pre_tokenizer"))
        vocab = check_ids(model["vocab"])
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        if not all(len(m) == 2 and all(isinstance(part, str) for part in m) for m in merges):
            raise ValueError("its merges are not pairs of tokens")
        check_merges(merges, vocab)
        prefix = self.config.get("add_prefix_space", False) if self.is_gpt2 else in_file
        if prefix != in_file:
            _LOGGER.warning(
                "%s: add_prefix_space is %s in tokenizer.json; taking %s, as transformers does",
                self.directory,
                in_file,
                prefix,
            )
        before, after = template.around(raw.get("post_processor"))
        description = Description(
            vocab, merges, add_prefix_space=bool(prefix), before=before, after=after
        )
        if self.is_gpt2:
            return description
        return replace(
            description,
            unknown=vocab.get(model.get("unk_token")),
            fused=bool(model.get("fuse_unk")),
            whole_words=bool(model.get("ignore_merges")),
        )

    def _compare(self, description: Description) -> None:
        """Log a warning if vocab.json is of another vocabulary than tokenizer.json beside it."""
        path = self.directory / "vocab.json"
        if path.is_file() and self._optional("vocab.json") != description.vocab:
            _LOGGER.warning(
                "%s has another vocabulary than tokenizer.json beside it; taking tokenizer.json, "
                "as transformers does",
                path,
            )

    # Added and special tokens.

    def _special_map(self) -> dict[str, Any]:
        return {} if "added_tokens_decoder" in self.config else self._optional(SPECIAL)

    def _named(self) -> dict[str, Any]:
        """Return the named special tokens as they stand in the files."""
        given = {**self.config, **self._special_map()}
        named = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        named = named if self.is_gpt2 else {}
        known = {name: given[name] for name in NAMED if name in given}
        others = {
            name: value
            for name, value in self.config.items()
            if name.endswith("_token") and name not in NAMED and isinstance(value, str | dict)
        }
        ordered = {name: {**named, **known}.get(name) for name in NAMED}
        return {name: value for name, value in {**ordered, **others}.items() if value}

    def _extra(self) -> list[Any]:
        """Return the further special tokens as they stand in the files."""
        found: list[Any] = []
        for source in (self.config, self._special_map()):
            extra = source.get("extra_special_tokens") or source.get("additional_special_tokens")
            found += extra.values() if isinstance(extra, dict) else extra or ()
        return found

    def _names(self) -> set[str]:
        """Return the names of all special tokens."""
        values = [*self._named().values(), *self._extra()]
        return {AddedToken.parse(value).content for value in values}

    def _in_decoder(self, raw_added: list[dict[str, Any]]) -> list[tuple[int, AddedToken]]:
        """Return the added tokens that the files list with an id, in the order of the ids."""
        listed: dict[int, AddedToken] = {}
        if "added_tokens_decoder" in self.config:
            for i, token in self.config["added_tokens_decoder"].items():
                listed[parse_id(i)] = AddedToken.parse(token)
        else:
            names = self._names()
            for name, i in self._optional(ADDED).items():
                special = name in names
                listed[i] = AddedToken(name, special=special, normalized=not special)
            for token in raw_added:
                listed[token["id"]] = AddedToken.parse(token)
        return sorted(listed.items())

    def _with_added(self, description: Description, raw_added: list[dict[str, Any]]) -> Description:
        """Return the description with all added tokens, in the order of transformers."""
        try:
            named = {n: AddedToken.parse(v, special=True) for n, v in self._named().items()}
            names = {token.content for token in named.values()}
            ids = AddedIds(description.vocab, str(self.directory))
            if not self.is_gpt2:
                for given in raw_added:
                    ids.add(AddedToken.parse(given), given["id"])
            for i, token in self._in_decoder(raw_added):
                special = token.special or token.content in names
                ids.add(replace(token, special=special), i)
            extra = [AddedToken.parse(value, special=True) for value in self._extra()]
            for token in (*named.values(), *extra):
                if token.content not in ids.by_name:
                    ids.add(token)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(
                f"the added tokens in {self.directory} do not fit: {reason(error)}"
            ) from None
        return replace(description, added=ids.tokens)

    def _end(self, description: Description) -> int | None:
        """Return the id of end-of-text."""
        ids = {**description.vocab, **{t.content: i for i, t in description.added.items()}}
        named = self._named().get("eos_token") or self._optional(SPECIAL).get("eos_token")
        given = self.config.get("eos_token") or self._special_map().get("eos_token")
        if not given and self.is_gpt2 and END_OF_TEXT not in description.vocab:
            # transformers adds the default; the vocabulary's own end is meant if it has one.
            usual = next((name for name in _USUAL_ENDS[1:] if name in description.vocab), None)
            named = usual or named
        if named:
            return ids.get(AddedToken.parse(named).content)
        usual = next((name for name in _USUAL_ENDS if name in ids), None)
        if usual is not None:
            return ids[usual]
        known = type(self.model_eos) is int and self.model_eos in ids.values()
        return self.model_eos if known else None

    def _begin(self, description: Description) -> int | None:
        """Return the id of the token that begins a text."""
        named = self._named().get("bos_token")
        ids = {token.content: i for i, token in description.added.items()}
        return ids.get(AddedToken.parse(named).content) if named else None

    def _with_around(self, description: Description) -> Description:
        """Return the description with the ids that add_bos_token and add_eos_token ask for."""
        ids = {t.content: i for i, t in description.added.items()}
        around = []
        for flag, name in (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")):
            token = self._named().get(name) if self.config.get(flag) else None
            around.append((ids[AddedToken.parse(token).content],) if token else ())
        return replace(description, before=around[0], after=around[1])

    def _texts(self, files: Sequence[Path]) -> dict[str, str]:
        """Return the files as transformers reads them, wherever they are put."""
        others = (self.directory / name for name in (SPECIAL, ADDED))
        paths = [*files, *(path for path in others if path.is_file())]
        texts = {path.name: path.read_bytes().decode("utf-8-sig") for path in paths}
        # Elsewhere another config.json might choose the class.
        chosen = _GPT2_CLASSES[0] if self.is_gpt2 else _BACKENDS[1]
        config = {**self.config, "tokenizer_class": chosen}
        return {**texts, CONFIG: json.dumps(config, indent=2, ensure_ascii=False) + "\n"}


def say_unreachable(directory: Path, description: Description) -> None:
    """Log a warning for bytes without a token, and for tokens that no text becomes.

    Raises ValueError if these are so many that the merges must be incomplete.
    """
    vocab = description.vocab
    missing = [symbol for symbol in BYTE_SYMBOLS if symbol not in vocab]
    if missing and description.unknown is None:
        _LOGGER.warning(
            "%s has no token for %d of the 256 bytes, such as 0x%02X: they are left out of a text",
            directory,
            len(missing),
            BYTE_SYMBOLS.index(missing[0]),
        )
    known = {a + b for a, b in description.merges}
    known |= {token.content for token in description.added.values()}
    lost = [token for token in vocab if token not in known and len(token) > 1]
    if not lost or description.whole_words:
        return
    if len(lost) >= MIN_LOST and len(lost) > MAX_LOST_SHARE * len(vocab):
        raise ValueError(
            f"{directory} has {len(lost)} tokens that no merge makes, such as {lost[0][:80]!r}: "
            "its merges are incomplete; get the files again"
        )
    _LOGGER.warning(
        "%s has %d tokens that no merge makes, such as %r: no text becomes them",
        directory,
        len(lost),
        lost[0][:80],
    )
