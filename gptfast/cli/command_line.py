"""The words of a command line read as the values of flags.

Only the flags that were given are returned, because files and saved settings rank between the
defaults and the flags.
"""

import re
import shlex
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from gptfast.cli.flags import Flag, UsageError
from gptfast.cli.hints import hint_for

_FLAG = re.compile(r"--?[A-Za-z][\w-]*(=.*)?", re.DOTALL)
_SWITCH = {"true": True, "false": False}


class CommandLine:
    """Reads the words after a command, such as `train`, by its flags.

    commands_with: returns the commands that have a flag, for hints.
    """

    def __init__(
        self,
        command: str,
        flags: Sequence[Flag],
        commands_with: Callable[[str], list[str]] = lambda flag: [],
    ) -> None:
        self.command, self._commands_with = command, commands_with
        self.flags = [flag for flag in flags if not flag.positional]
        self.positional = [flag for flag in flags if flag.positional]
        self._named: dict[str, tuple[Flag, bool]] = {}  # with whether the switch is on
        for flag in self.flags:
            self._named[flag.long] = flag, True
            if flag.short:
                self._named[flag.short] = flag, True
            if flag.kind is bool:
                self._named[f"--no-{flag.long[2:]}"] = flag, False

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """Return the value of each flag in argv by its field's name. Raises UsageError."""
        waiting, loose = deque(argv), list[str]()
        switches: dict[str, Any] = {}
        given: list[tuple[Flag, list[str]]] = []
        while waiting:
            word = waiting.popleft()
            if word == "--":
                loose += waiting
                break
            if not looks_like_flag(word):
                if hint := self._attached_hint(word):  # -p'Once upon'
                    self.error(f"there is no flag {word.split()[0]}{hint}")
                loose.append(word)
                continue
            flag, on, attached = self._find(word)
            if flag.kind is bool:
                switches[flag.name] = self._switch(word, on, attached)
            else:
                given.append((flag, self._take(flag, word, attached, waiting)))
        values = self._loose(loose, given, switches)
        for flag, texts in given:
            read = [flag.value(text) for text in texts]
            if flag.count is None:
                values[flag.name] = [*values.get(flag.name, ()), *read]
            else:
                values[flag.name] = read[0] if flag.count == 1 else read
        self._check_required(values)
        return values | switches

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with a message and where to find the flags."""
        raise UsageError(f"{message} (see gptfast {self.command} --help)")

    def _find(self, word: str) -> tuple[Flag, bool, str | None]:
        """Return the flag of a word, whether a switch is on, and the value after =, if any."""
        name, equals, value = word.partition("=")
        attached = value if equals else None
        # --n_layer means --n-layer.
        if found := self._named.get(name.replace("_", "-")):
            return *found, attached
        short = self._named.get(word[:2])
        if short and short[0].kind in (int, float) and word[2:3].isdigit():  # -n50
            return *short, word[2:]
        every = [*self.positional, *self.flags]
        hint = hint_for(name, self.command, every, self._commands_with)
        self.error(f"there is no flag {name}{hint or self._attached_hint(word)}")

    def _attached_hint(self, word: str) -> str:
        """Return the hint for a short flag with its value attached, as in -pHi, or ""."""
        # -prompt may mean --prompt, so the value is not taken from the word itself.
        if word[:2] not in self._named or not word[2:]:
            return ""
        return f"; perhaps you meant {word[:2]} {shlex.quote(word[2:])}"

    def _switch(self, word: str, on: bool, attached: str | None) -> bool:
        """Return the value of a switch such as --compile, --no-compile or --compile=false."""
        if attached is None:
            return on
        if attached.lower() not in _SWITCH or not on:
            self.error(f"{word.partition('=')[0]} takes no value, got {attached!r}")
        return _SWITCH[attached.lower()]

    def _take(self, flag: Flag, word: str, attached: str | None, waiting: deque[str]) -> list[str]:
        """Return the values of a flag, taken from the words that follow it."""
        texts = [] if attached is None else [attached]
        name = word.partition("=")[0]
        while len(texts) < (flag.count or 1):
            # -- in the place of a value is the value, as everywhere on Unix.
            if not waiting or (looks_like_flag(waiting[0]) and waiting[0] != "--"):
                n = "a value" if flag.count == 1 else f"{flag.count or 'one or more'} values"
                after = self._dash_hint(name, flag, waiting[0]) if waiting else ""
                self.error(f"{name} takes {n}, {flag.metavar}{after}")
            texts.append(waiting.popleft())
        if flag.count is None and attached is None:
            while waiting and waiting[0] != "--" and not looks_like_flag(waiting[0]):
                texts.append(waiting.popleft())
        return texts

    def _dash_hint(self, name: str, flag: Flag, next_word: str) -> str:
        """Return how a value that begins with a dash is written."""
        if flag.kind is not str or flag.count not in (1, None):
            return f", got {next_word}"
        if next_word.partition("=")[0].replace("_", "-") in self._named:
            return f", and {next_word} is a flag (as a value it is written {name}={next_word})"
        return f"; a value that begins with a dash is written {name}={next_word}"

    def _loose(
        self,
        loose: list[str],
        given: list[tuple[Flag, list[str]]],
        switches: dict[str, Any],
    ) -> dict[str, Any]:
        """Return the positional arguments' values, from the words that belong to no flag."""
        values: dict[str, Any] = {}
        required = sum(flag.required for flag in self.positional)
        # `generate --stop . , RUN`: the last value of a list is the argument that is missing.
        lists = [texts for flag, texts in given if flag.count is None and len(texts) > 1]
        if lists and len(loose) == required - 1:
            loose = [*loose, lists[-1].pop()]
        for flag in self.positional:
            if flag.count is None and loose:
                values[flag.name] = [flag.value(text) for text in loose]
                loose = []
            elif loose:
                values[flag.name] = flag.value(loose[0])
                loose = loose[1:]
        if loose:
            self._refuse_loose(loose[0], switches)
        return values

    def _refuse_loose(self, word: str, switches: dict[str, Any]) -> NoReturn:
        """Raise UsageError for a word that belongs to no flag."""
        remedy = ""
        if word.lower() in _SWITCH and switches:
            last = [*switches][-1].replace("_", "-")
            remedy = f"; a switch takes no value: --{last} or --no-{last}"
        elif word[0] in "\u2010\u2011\u2012\u2013\u2014\u2212":
            remedy = "; it begins with another kind of dash than -"
        elif "prompt" in {flag.name for flag in self.flags}:
            remedy = "; text with spaces needs quotes around it"
        elif "data" in {flag.name for flag in self.flags}:
            remedy = f"; if it is data, write --data {word}"
        self.error(f"{word!r} belongs to no flag{remedy}")

    def _check_required(self, values: dict[str, Any]) -> None:
        """Raise UsageError if a required flag or argument is missing."""
        every = (*self.positional, *self.flags)
        missing = [flag.long for flag in every if flag.required and flag.name not in values]
        if missing:
            self.error(f"required: {', '.join(missing)}")


def looks_like_flag(word: str) -> bool:
    """Return whether a word is written as a flag is: --name, -n or --name=value, and no number."""
    if not _FLAG.fullmatch(word):
        return False
    try:
        float(word)  # such as -inf
    except ValueError:
        return True
    return False
