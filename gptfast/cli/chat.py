"""`gptfast chat`: a conversation in the terminal, or one turn a line from a pipe."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from gptfast.cli.model_flags import ON_CPU, GenerationFlags
from gptfast.cli.terminal import ERRORS, is_terminal, one_line, printable, speed
from gptfast.generation.conversation import QUESTIONS, Conversation, Template
from gptfast.generation.options import Options, new_tokens
from gptfast.model import GPT

if TYPE_CHECKING:
    from gptfast.engine import Engine

HELP = """\
/retry             take back the last reply and draw another
/reset             forget everything said
/save FILE         write the conversation; to .jsonl as prompts with completions
/temperature X     set it; also /top_k N, /top_p P, /min_p P, /repetition_penalty X, /seed N and
                   /max_new_tokens N; "off" switches off, without a value it is shown
/stats             tokens a second after each reply, or not
/quit              leave, as Ctrl-D does; Ctrl-C stops a reply, or clears the line
Text that begins with / is written //."""
WHOLE = ("top_k", "seed", "max_new_tokens")
SETTINGS = (*WHOLE, "temperature", "top_p", "min_p", "repetition_penalty")
OFF = {"top_k": None, "top_p": None, "min_p": None, "repetition_penalty": 1.0}
HISTORY_LINES = 1000


@dataclass(frozen=True, kw_only=True)
class Chat(GenerationFlags):
    """Talk with a model: a prompt a turn, the reply as it is written. /help lists the commands.

    The template writes a turn, and the reply follows at once. GPT-2 is no assistant: it continues
    a text of questions and answers. For a model tuned on prompts with completions, give
    the template that makes a prompt of its kind, '{prompt} ' for docs/finetuning.md. '{prompt}'
    is plain text that the model and you continue in turns.

    gptfast chat gpt2 --dtype int8

    gptfast chat runs/tuned --template '{prompt} ' --temperature 0

    gptfast chat gpt2 --template '{prompt}' --max-new-tokens 50
    """

    template: str = QUESTIONS
    """How a turn is written, {prompt} being yours. If words stand before it, a reply ends where
    the model writes them itself, otherwise at end-of-text."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token each time."""
    top_p: float | None = 0.95
    """Keep the smallest set of tokens with this probability."""

    def run(self) -> None:
        if sys.stdin is None:
            raise ValueError("chat reads what you say from standard input, which is closed")
        template = Template.parse(self.template)
        settings = {name: getattr(self, name) for name in SETTINGS}
        _check(settings)
        model, tokenizer = self.load()
        options = {k: v for k, v in self.options().items() if k not in SETTINGS}
        Options(**options).check_beams(model.config.vocab_size)  # what guesses is known by now
        conversation = Conversation(template, tokenizer)
        shows_speed = self.shows_speed(model)
        session = _Session(model, conversation, settings, options, shows_speed)
        if not (is_terminal(sys.stdin) and is_terminal(sys.stdout)):
            session.run(line.rstrip("\r\n") for line in sys.stdin)
            return
        kind = f"{self.checkpoint}" + ("" if isinstance(model, GPT) else f" in {model.dtype}")
        size = model.config.block_size
        _say(f"{kind}, a context of {size:,} tokens. /help lists commands, Ctrl-D ends.")
        session.interactive = True
        with contextlib.suppress(KeyboardInterrupt):  # a second one in a reply, or between prompts
            session.run(_typed())


class _Session:
    """Turns and commands, one after the other."""

    def __init__(
        self,
        model: "GPT | Engine",
        conversation: Conversation,
        settings: dict[str, Any],
        options: dict[str, Any],
        shows_speed: bool,
    ) -> None:
        self.model, self.conversation, self.settings = model, conversation, settings
        self.options, self.shows_speed, self.interactive = options, shows_speed, False

    def run(self, lines: Iterable[str]) -> None:
        """Until the lines end, or /quit. What is wrong with one ends a pipe, not a session."""
        for line in lines:
            try:
                if not self._take(line):
                    return
            except ERRORS as error:
                if not self.interactive:
                    raise
                _say(one_line(error))

    def _take(self, line: str) -> bool:
        """Whether to go on after this line."""
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
        if name in SETTINGS:
            self._set(name, value)
            return True
        if name == "save" and value:
            self.conversation.save(value)
            return True
        if name == "save" or value:
            raise ValueError("/save takes a file" if name == "save" else f"/{name} takes nothing")
        if name == "help":
            print(HELP, flush=True)
        elif name == "reset":
            self.conversation.reset()
        elif name == "retry":
            self.conversation.ask(self.conversation.take_back())
            self.settings["seed"] = (self.settings["seed"] + 1 + 2**63) % 2**64 - 2**63  # an int64
            self._reply()
        elif name == "stats":
            if isinstance(self.model, GPT):
                raise ValueError(f"/stats needs {ON_CPU}, and the C++ extension")
            self.shows_speed = not self.shows_speed
        elif name != "quit":
            raise ValueError(f"there is no /{name}; /help lists what there is")
        return name != "quit"

    def _set(self, name: str, value: str) -> None:
        if value:
            changed = {**self.settings, name: _number(name, value)}
            _check(changed)
            self.settings = changed
        now = self.settings[name]
        _say(f"{name} is {'off' if now is None else now}")

    def _reply(self) -> None:
        options = {**self.settings, **self.options}
        n, size = options.pop("max_new_tokens"), self.model.config.block_size
        if forgotten := self.conversation.make_room(size, n):
            turns = "turn does" if forgotten == 1 else f"{forgotten} turns do"
            _say(f"the oldest {turns} not fit into {size:,} tokens any more: forgotten")
        if (long := len(self.conversation.ids)) > size:
            _say(f"of {long:,} tokens the model sees the last {size:,}")
        with _ctrl_c(self.interactive) as interrupted:
            pieces = self.conversation.reply(self.model, n, interrupted, **options)
            if not self.conversation.template.running:
                pieces = _trimmed(pieces)
            piece = ""
            try:
                for piece in pieces:
                    print(printable(piece), end="", flush=True)
            except ERRORS:
                if piece:  # what is wrong gets a line of its own
                    print(flush=True)
                raise
        print(flush=True)
        if self.shows_speed:
            _say(speed(self.model))


def _number(name: str, value: str) -> float | None:
    if value == "off" and name in OFF:
        return OFF[name]
    try:
        return int(value) if name in WHOLE else float(value)
    except ValueError:
        kind = "a whole number" if name in WHOLE else "a number"
        raise ValueError(f"/{name} takes {kind}, got {value!r:.100}") from None


def _check(settings: dict[str, Any]) -> None:
    """ValueError for a setting that is out of range."""
    options = dict(settings)
    new_tokens(options.pop("max_new_tokens"))
    checked = Options(**options)
    like = torch.empty(1, 0)
    checked.sampling(like), checked.penalty(like)


def _trimmed(pieces: Iterable[str]) -> Iterator[str]:
    """Pieces of a text without the white space around it."""
    held = None
    for piece in pieces:
        text = piece.lstrip() if held is None else held + piece
        if body := text.rstrip():
            held = text[len(body) :]
            yield body
        elif held is not None:
            held = text


def _say(line: str) -> None:
    """A line that is no part of the conversation: on stderr, dim where it can be."""
    plain = not sys.stderr.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    print(line if plain else f"\x1b[2m{line}\x1b[0m", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _ctrl_c(caught: bool) -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C is an answer to the question yielded, not an exception: between two tokens the
    engine is whole. A second one is."""
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


def _typed() -> Iterator[str]:
    """Lines typed at the prompt, until Ctrl-D there; Ctrl-C begins the line anew."""
    remember = _history()
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


def _history() -> Callable[[], None]:
    """Line editing, with the lines of earlier sessions. What is returned keeps the last line."""
    try:
        import readline
    except ImportError:  # a Python without it: input() as it is
        return lambda: None
    from gptfast.files import cache_directory

    try:
        path = cache_directory() / "chat_history"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        if path.is_file() and path.stat().st_mode & 0o077:  # it was there, for others to read
            path.chmod(0o600)
        readline.clear_history()
        readline.read_history_file(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        _say(f"lines are not kept for another session: {error}")
        return lambda: None
    readline.set_history_length(HISTORY_LINES)
    held = readline.get_current_history_length()

    def remember() -> None:
        nonlocal held
        before, held = held, readline.get_current_history_length()
        if held > before:  # neither empty nor the same as the line before
            with contextlib.suppress(OSError):
                readline.append_history_file(held - before, path)

    return remember
