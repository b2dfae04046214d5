"""`gptfast chat`: talk with a model in the terminal, or send it one turn per line of a pipe."""

import contextlib
import difflib
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, ClassVar

from gptfast.checks import one_line
from gptfast.cli.flags import UsageError
from gptfast.cli.generate import unescaped
from gptfast.cli.model_flags import (
    INTEGER_SETTINGS,
    NEEDS_ENGINE,
    SETTINGS,
    GenerationFlags,
    check_settings,
    new_seed,
)
from gptfast.cli.terminal import ERRORS, is_terminal, print_note, printable, speed
from gptfast.data.rows import BYTE_ORDER_MARK
from gptfast.generation.conversation import QUESTIONS, Conversation, Template
from gptfast.generation.decoder import Decoder, Stats
from gptfast.generation.options import Options, next_seed

HELP = """\
/retry             replace the last reply with another one
/reset             forget the conversation
/save FILE         write the conversation to a file; a .jsonl file gets prompts with completions
/temperature X     set the temperature; /top_k N, /top_p P, /min_p P, /repetition_penalty X, /seed N
                   and /max_new_tokens N work the same way; "off" switches a setting off, and
                   without a value the setting is printed
/stats             switch the line with tokens per second after each reply on or off
/quit              end the conversation, as /exit, exit and Ctrl-D do; Ctrl-C stops a reply or
                   clears the line
To begin a message with /, type // instead."""
COMMANDS = ("retry", "reset", "save", "stats", "help", "quit", "exit")
LEAVE = ("exit", "quit")
"""Lines that end the conversation without a slash, as in other programs with a prompt."""
OTHER_NAMES = {"temp": "temperature", "clear": "reset", "regenerate": "retry", "bye": "quit"}
"""What other chats call our commands."""
OFF_VALUES = {"top_k": None, "top_p": None, "min_p": None, "repetition_penalty": 1.0}
HISTORY = "chat_history"
"""The file of earlier lines in the cache directory."""
MAX_HISTORY_LINES = 1000


@dataclass(frozen=True, kw_only=True)
class Chat(GenerationFlags):
    """Talk with a model: type a message, read the reply. Inside, /help lists the commands.

    In a terminal, your lines are kept for the next chat, where the arrow keys bring them back: in
    the file chat_history of the cache directory ($GPTFAST_CACHE, or else gptfast in
    $XDG_CACHE_HOME or ~/.cache), which only you can read. --no-history keeps none.

    The template turns each message into text for the model to continue. GPT-2 is no assistant, so
    the default template writes questions and answers. For a model finetuned on prompts with
    completions, give the template of its prompts, for example '{prompt} ' for docs/finetuning.md.
    With '{prompt}' the model and you continue one text in turns.

    gptfast chat gpt2 --dtype int8

    gptfast chat runs/tuned --template '{prompt} ' --temperature 0

    gptfast chat gpt2 --template '{prompt}' --max-new-tokens 50
    """

    template: str = QUESTIONS
    """The text of a turn, in which {prompt} stands for your message. A reply ends where the model
    writes the words that stand before {prompt}, or at end-of-text if there are none. \\n in it is a
    line break."""
    history: bool = True
    """Keep the lines that you type in a terminal for the next chat."""
    temperature: float = 0.8
    """Divides the logits. Below 1 the text is more predictable; 0 always takes the most likely
    token."""
    top_p: float | None = 0.95
    """Sample from the smallest set of tokens whose probabilities add up to at least
    this."""
    set_first: ClassVar = (
        *("max_new_tokens", "temperature", "top_k", "top_p", "seed", "template"),
        *("dtype", "tokenizer", "device"),
    )

    def run(self) -> None:
        if sys.stdin is None:
            raise ValueError("chat reads your messages from standard input, which is closed")
        try:
            template = Template.parse(unescaped(self.template))
        except ValueError as error:
            raise UsageError(str(error)) from None
        settings = {name: getattr(self, name) for name in SETTINGS}
        settings["seed"] = new_seed() if self.seed is None else self.seed
        check_settings(settings)
        model, tokenizer = self.load()
        options = {k: v for k, v in self.options().items() if k not in SETTINGS}
        Options(**options).check_beams(model.config.vocab_size)  # the draft model is loaded now
        conversation = Conversation(template, tokenizer, model.eos_ids)
        shows_speed = self.shows_speed and model.stats is not None
        session = _Session(model, conversation, settings, options, shows_speed)
        session.announces_seed = self.seed is None
        if not (is_terminal(sys.stdin) and is_terminal(sys.stdout)):
            session.run(_piped_lines())
            return
        kind = self.checkpoint + (f" in {model.dtype}" if model.dtype else "")
        size = model.config.block_size
        print_note(
            f"{kind}, a context of {size:,} tokens. /help lists the commands, Ctrl-D ends the chat."
        )
        session.interactive = True
        with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C during a reply
            session.run(_typed_lines(self.history))


class _Session:
    """A conversation with its settings, which takes turns and commands line by line."""

    def __init__(
        self,
        model: Decoder,
        conversation: Conversation,
        settings: dict[str, Any],
        options: dict[str, Any],
        shows_speed: bool,
    ) -> None:
        self.model, self.conversation, self.settings = model, conversation, settings
        self.options, self.shows_speed, self.interactive = options, shows_speed, False
        self.announces_seed = False

    def run(self, lines: Iterable[str]) -> None:
        """Take lines until they end or one is /quit. An error ends a pipe, but not a terminal."""
        for line in lines:
            try:
                if not self._take(line):
                    return
            except ERRORS as error:
                if not self.interactive:
                    raise
                print_note(one_line(error))

    def _take(self, line: str) -> bool:
        """Answer or obey one line; return whether to read another."""
        if line.strip() in LEAVE:
            return False
        if line.startswith("/") and not line.startswith("//"):
            name, _, value = line[1:].partition(" ")
            return self._command(name, value.strip())
        line = line.removeprefix("/") if line.startswith("//") else line
        template = self.conversation.template
        if line.strip() or template.running and self.conversation.turns:
            self.conversation.ask(line)
            self._reply()
        return True

    def _command(self, name: str, value: str) -> bool:
        """Obey a command; return whether to read another line."""
        name = name.replace("-", "_")
        if name not in (*SETTINGS, *COMMANDS):
            raise ValueError(f"there is no /{name}{_hint(name)}; /help lists the commands")
        if name in SETTINGS:
            self._set(name, value)
            return True
        if name == "save" and value:
            self.conversation.save(value)
            print_note(f"the conversation is in {value}")
            return True
        if name == "save" or value:
            raise ValueError("/save takes a file" if name == "save" else f"/{name} takes no value")
        if name == "help":
            print(HELP, flush=True)
        elif name == "reset":
            self.conversation.reset()
        elif name == "retry":
            self.conversation.ask(self.conversation.take_back())
            self.settings["seed"] = next_seed(self.settings["seed"])
            self._reply()
        elif name == "stats":
            if self.model.stats is None:
                raise ValueError(f"/stats {NEEDS_ENGINE}")
            self.shows_speed = not self.shows_speed
            print_note(f"stats are {'on' if self.shows_speed else 'off'}")
        return name not in LEAVE

    def _set(self, name: str, value: str) -> None:
        """Change a setting if a value is given, and print it."""
        if value:
            changed = {**self.settings, name: _number(name, value)}
            check_settings(changed)
            self.settings = changed
        now = self.settings[name]
        print_note(f"{name} is {'off' if now is None else now}")

    def _reply(self) -> None:
        """Generate the reply and print it piece by piece."""
        options = {**self.settings, **self.options}
        n, size = options.pop("max_new_tokens"), self.model.config.block_size
        if self.announces_seed and n and self.settings["temperature"] != 0:
            seed, self.announces_seed = self.settings["seed"], False
            print_note(f"seed {seed}: --seed {seed} repeats these replies")
        if forgotten := self.conversation.make_room(size, n):
            turns = "turn no longer fits" if forgotten == 1 else f"{forgotten} turns no longer fit"
            print_note(f"the oldest {turns} into {size:,} tokens and will be left out")
        if (long := len(self.conversation.ids)) > size:
            print_note(f"the model sees only the last {size:,} of {long:,} tokens")
        with _caught_ctrl_c(self.interactive) as interrupted:
            pieces = self.conversation.reply(self.model, n, interrupted, **options)
            if not self.conversation.template.running:
                pieces = _trimmed(pieces)
            piece = ""
            try:
                for piece in pieces:
                    print(printable(piece), end="", flush=True)
            except ERRORS:
                if piece:  # the error message starts on a new line
                    print(flush=True)
                raise
        print(flush=True)
        if self.shows_speed and self.model.stats:
            print_note(speed(self.model.stats))
            self.model.stats = Stats()


def _hint(name: str) -> str:
    """Return the command that was perhaps meant, for an error about an unknown one."""
    names = (*SETTINGS, *COMMANDS)
    begin = [known for known in names if name and known.startswith(name)]
    near = difflib.get_close_matches(name, names, n=1)
    meant = OTHER_NAMES.get(name) or next(iter([*begin, *near]), None)
    return f"; perhaps you meant /{meant}" if meant else ""


def _number(name: str, value: str) -> float | None:
    """Return the value of a setting from its text. Raises ValueError for a wrong one."""
    if value == "off" and name in OFF_VALUES:
        return OFF_VALUES[name]
    try:
        return int(value) if name in INTEGER_SETTINGS else float(value)
    except ValueError:
        kind = "a whole number" if name in INTEGER_SETTINGS else "a number"
        raise ValueError(f"/{name} takes {kind}, got {value!r:.100}") from None


def _trimmed(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the pieces of a text without the white space at its start and end."""
    held = None  # white space that is dropped unless more text follows
    for piece in pieces:
        text = piece.lstrip() if held is None else held + piece
        if body := text.rstrip():
            held = text[len(body) :]
            yield body
        elif held is not None:
            held = text


@contextlib.contextmanager
def _caught_ctrl_c(caught: bool) -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed inside the context.

    The first Ctrl-C raises nothing, because the engine must finish its decode step. A second one
    raises KeyboardInterrupt. caught: False leaves Ctrl-C as it is.
    """
    if not caught:
        yield lambda: False
        return
    pressed: list[int] = []

    def press(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _piped_lines() -> Iterator[str]:
    """Yield the lines of standard input. Raises ValueError for one that is not UTF-8."""
    for number, line in enumerate(sys.stdin, 1):
        if re.search("[\ud800-\udfff]", line):  # what Python makes of other bytes
            raise ValueError(f"line {number} of standard input is not UTF-8 text; convert it first")
        yield (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).rstrip("\r\n")


def _typed_lines(keeps_history: bool) -> Iterator[str]:
    """Yield the lines typed at the prompt until Ctrl-D. Ctrl-C clears the line."""
    remember = _open_history(keeps_history)
    while True:
        try:
            line = input("> ")
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        remember()
        yield line


def _open_history(keeps: bool = True) -> Callable[[], None]:
    """Offer the lines of earlier chats for editing; return a function that saves the last line.

    keeps: False offers and saves the lines of this chat only, and touches no file.
    """
    try:
        import readline
    except ImportError:  # Python was built without it: input() has no line editing
        return lambda: None
    from gptfast.files import cache_directory

    if not keeps:
        readline.clear_history()
        return lambda: None
    try:
        path = cache_directory() / HISTORY
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        if path.is_file() and path.stat().st_mode & 0o077:  # an older file that others could read
            path.chmod(0o600)
        readline.clear_history()
        readline.read_history_file(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        print_note(f"this chat's lines cannot be kept for the next one: {error}")
        return lambda: None
    readline.set_history_length(MAX_HISTORY_LINES)
    held = readline.get_current_history_length()

    def remember() -> None:
        nonlocal held
        before, held = held, readline.get_current_history_length()
        if held > before:  # readline skips empty and repeated lines
            with contextlib.suppress(OSError):
                readline.append_history_file(held - before, path)

    return remember
