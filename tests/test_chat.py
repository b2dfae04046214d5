"""Test `gptfast chat`: the text that the model sees, commands, pipes, and a real terminal."""

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Capture, refused, run
from helpers import (
    random_model,
)

from gptfast import Engine, get_tokenizer
from gptfast.cli import chat
from gptfast.generation import conversation
from gptfast.generation.conversation import QUESTIONS, Conversation, Template
from gptfast.ops.backend import EXTENSION
from gptfast.tokenizer.bpe import END_OF_TEXT

BYTE = get_tokenizer("byte")
SIZE = 96
needs_engine = pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "model"
    tiny = random_model(vocab_size=257, block_size=SIZE)
    with torch.no_grad():  # so that it never draws end-of-text
        tiny.ln_f.bias.fill_(2.0)
        tiny.wte.weight[BYTE.eot] = -9.0
    tiny.save_pretrained(path)
    return path


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Record the model's input; its replies are "one", "two" and so on, each with end-of-text."""
    given: list[tuple[str, dict[str, Any]]] = []
    words = iter("one two three four five six".split())

    def stream(model: object, ids: list[int], n: int, **options: Any) -> Iterator[int]:
        given.append((text_of(ids), options))
        yield from [*BYTE.encode(next(words)), BYTE.eot][:n]

    monkeypatch.setattr(conversation, "stream", stream)
    yield given


def text_of(ids: list[int]) -> str:
    return "".join(END_OF_TEXT if i == BYTE.eot else chr(i) for i in ids)


def piped(
    lines: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture, *args: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    seed = () if "--seed" in args else ("--seed", 0)
    return run(capsys, "chat", *args, *seed, "--tokenizer", "byte")


@pytest.mark.parametrize(
    ("template", "seen"),
    [
        (QUESTIONS, "Q: hi\nA:one\nQ: you\nA:"),
        ("\nUser: {prompt}\nBot: ", "\nUser: hi\nBot: one\nUser: you\nBot: "),
        ("{prompt} ", f"hi one{END_OF_TEXT}you "),
        ("{prompt}", f"hione{END_OF_TEXT}you"),
    ],
    ids=["dialogue", "own-line-break", "completions", "running"],
)
def test_what_the_model_sees(
    template: str, seen: str, model: Path, spoken: list, monkeypatch: Any, capsys: Capture
) -> None:
    args = (model, "--template", template, "--temperature", 0.5)
    assert piped("hi\nyou\n", monkeypatch, capsys, *args) == (0, "one\ntwo\n", "")
    assert [text for text, _ in spoken] == [template.replace("{prompt}", "hi"), seen]
    assert spoken[0][1]["temperature"] == 0.5


@pytest.mark.parametrize(
    ("template", "stop"),
    [
        (QUESTIONS, "\nQ:"),
        ("\n## {prompt}\n", "\n##"),
        ("\n{prompt}\n", "\n"),
        ("{prompt} ", None),
        ("{prompt}", None),
    ],
)
def test_a_reply_ends_where_the_next_prompt_begins(template: str, stop: str | None) -> None:
    assert Template.parse(template).stop == stop


@pytest.mark.parametrize("text", ["", "prompt", "{prompt} or {prompt}"])
def test_no_template(text: str, model: Path, capsys: Capture) -> None:
    refused(run(capsys, "chat", model, "--template", text), "--template must have {prompt} in it")


def test_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stop is neither shown nor kept, and no end-of-text is added to a reply cut at a stop."""
    monkeypatch.setattr(conversation, "stream", lambda *_, **__: BYTE_STREAM("yes\nQ no\nQ: me"))
    talk = Conversation(Template.parse(QUESTIONS), BYTE)
    talk.ask("a")
    assert "".join(talk.reply(None, 99)) == "yes\nQ no"
    assert text_of(talk.ids) == "Q: a\nA:yes\nQ no"
    talk.ask("b")
    assert text_of(talk.ids) == "Q: a\nA:yes\nQ no\nQ: b\nA:"


def BYTE_STREAM(text: str) -> Iterator[int]:  # noqa: N802 - a generator, closed as stream's is
    yield from BYTE.encode(text)


def test_an_interrupted_reply_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens before the interrupt are kept, except a possible beginning of a stop."""
    monkeypatch.setattr(conversation, "stream", lambda *_, **__: BYTE_STREAM("so be\nQ it"))
    talk, asked = Conversation(Template.parse(QUESTIONS), BYTE), iter(range(99))
    talk.ask("a")
    assert "".join(talk.reply(None, 99, lambda: next(asked) == 6)) == "so be"
    assert (talk.turns[0].text, text_of(talk.turns[0].reply)) == ("so be", "so be")


def test_the_oldest_turns_are_forgotten(
    model: Path, spoken: list, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    long = "x" * 30
    lines = f"{long}\nb\n{long}\n{long}\n" + "y" * 200 + "\n"
    code, output, err = piped(lines, monkeypatch, capsys, model, "--max-new-tokens", 20)
    assert (code, output) == (0, "one\ntwo\nthree\nfour\nfive\n")
    # There is room for SIZE - 20 tokens; where it is full, half of it is cleared.
    third = f"Q: {long}\nA:one\nQ: b\nA:two\nQ: {long}\nA:"
    assert len(third) > SIZE - 20
    assert len(f"\nQ: b\nA:two\nQ: {long}\nA:") > (SIZE - 20) // 2
    assert spoken[2][0] == f"\nQ: {long}\nA:"
    assert spoken[3][0] == f"\nQ: {long}\nA:"
    assert spoken[4][0] == "\nQ: " + "y" * 200 + "\nA:"
    assert err.splitlines() == [
        f"the oldest 2 turns no longer fit into {SIZE} tokens and will be left out",
        f"the oldest turn no longer fits into {SIZE} tokens and will be left out",
        f"the oldest turn no longer fits into {SIZE} tokens and will be left out",
        f"the model sees only the last {SIZE} of 207 tokens",
    ]


@pytest.mark.parametrize("n", [1, 10, 40, 1000])
def test_room_is_made_for_several_turns(n: int) -> None:
    """Turns are forgotten seldom, so that most of them keep what is cached before them."""
    talk, size = Conversation(Template.parse(QUESTIONS), BYTE), 400
    most, forgetting = size - min(n, size // 2), 0
    for _ in range(100):
        talk.ask("why")
        forgotten = talk.make_room(size, n)
        assert len(talk.ids) <= most
        forgetting += forgotten > 0
        assert forgotten in (0, 1) or len(talk.ids) > most // 2 - 20
        talk.turns[-1].reply = BYTE.encode("because")
    assert forgetting <= 100 / (most // 2 // 20) + 1


@pytest.mark.parametrize("line", ["/exit", "exit", "/quit", "quit", " exit "])
def test_words_that_leave(
    line: str, model: Path, spoken: list, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert piped(f"a\n{line}\nb\n", monkeypatch, capsys, model) == (0, "one\n", "")
    assert len(spoken) == 1
    assert piped("exit the room\n", monkeypatch, capsys, model)[1] == "two\n"


def test_settings_with_hyphens(
    model: Path, spoken: list, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    lines = "/top-k 3\n/max-new-tokens 5\n"
    note = "top_k is 3\nmax_new_tokens is 5\n"
    assert piped(lines, monkeypatch, capsys, model) == (0, "", note)


def test_a_seed_that_can_be_had_again(
    model: Path, spoken: list, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n"))
    _, _, err = run(capsys, "chat", model, "--tokenizer", "byte")
    seed = int(err.split(":")[0].removeprefix("seed "))
    assert err == f"seed {seed}: --seed {seed} repeats these replies\n"
    assert [options["seed"] for _, options in spoken] == [seed, seed]


def test_a_template_with_an_escaped_line_break(
    model: Path, spoken: list, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The help shows the default template with \\n, so that is how people type one."""
    piped("hi\n", monkeypatch, capsys, model, "--template", r"Q: {prompt}\nA:")
    assert spoken[0][0] == "Q: hi\nA:"


def test_no_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTFAST_CACHE", str(tmp_path / "cache"))
    chat._open_history(False)()
    assert not (tmp_path / "cache").exists()
    chat._open_history()()
    assert (tmp_path / "cache" / chat.HISTORY).is_file()


def test_commands(
    model: Path, spoken: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    script = f"""\
/help

a
/retry
/temperature 0.1
/top_k 7
/top_p off
/seed
b
/save {tmp_path / "talk.txt"}
/save {tmp_path / "talk.jsonl"}
/reset
//c
/quit
never
"""
    code, output, err = piped(script, monkeypatch, capsys, model, "--seed", 3)
    assert (code, output) == (0, f"{chat.HELP}\none\ntwo\nthree\nfour\n")
    saved = [f"the conversation is in {tmp_path / name}" for name in ("talk.txt", "talk.jsonl")]
    changed = ["temperature is 0.1", "top_k is 7", "top_p is off", "seed is 4"]
    assert err.splitlines() == [*changed, *saved]
    texts = ["Q: a\nA:", "Q: a\nA:", "Q: a\nA:two\nQ: b\nA:", "Q: /c\nA:"]
    assert [text for text, _ in spoken] == texts
    assert [options["seed"] for _, options in spoken] == [3, 4, 4, 4]
    last = {"temperature": 0.1, "top_k": 7, "top_p": None, "min_p": None}
    assert last.items() <= spoken[3][1].items()
    assert (tmp_path / "talk.txt").read_text() == "Q: a\nA:two\nQ: b\nA:three\n"
    records = [json.loads(line) for line in (tmp_path / "talk.jsonl").read_text().splitlines()]
    assert records == [
        {"prompt": "Q: a\nA:", "completion": "two"},
        {"prompt": "Q: b\nA:", "completion": "three"},
    ]


BAD_LINES = {
    "/nope": ["there is no /nope; /help"],
    "/quit now": ["/quit takes no value"],
    "/save": ["/save takes a file"],
    "/save .": [". exists"],
    "/save no/where/x": ["cannot write no/where/x"],
    "/save ~nosuchuser/x": ["cannot write ~nosuchuser/x"],
    "/retry": ["there is no turn yet"],
    "/seed x": ["/seed takes a whole number, got 'x'"],
    "/seed off": ["/seed takes a whole number, got 'off'"],
    "/temperature hot": ["/temperature takes a number, got 'hot'"],
    "/temperature -1": ["temperature must be", "got -1.0"],
    "/top_k -1": ["top-k must be an integer >= 1, or 0 for off, got -1"],
    "/temprature 0.3": ["there is no /temprature; perhaps you meant /temperature; /help"],
    "/temp 0.3": ["perhaps you meant /temperature"],
    "/max_tokens 3": ["perhaps you meant /max_new_tokens"],
    "/clear": ["perhaps you meant /reset"],
    "/": ["there is no /; /help"],
    "/max_new_tokens -1": ["max_new_tokens must be an integer >= 0, got -1"],
    "\ud800": ["line 1 of standard input is not UTF-8 text"],
}


@pytest.mark.parametrize("line", BAD_LINES, ids=ascii)
def test_a_bad_line_ends_a_pipe(
    line: str, model: Path, spoken: list, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    refused(piped(f"{line}\nhi\n", monkeypatch, capsys, model), *BAD_LINES[line])
    assert not spoken


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nowhere"], ["nowhere is not a checkpoint"]),
        ([], ["required: CHECKPOINT"]),
        (["MODEL", "--top-p", 4], ["top_p must be in (0, 1], got 4.0"]),
        (["MODEL", "--max-new-tokens", -1], ["max_new_tokens must be an integer >= 0, got -1"]),
        (["MODEL", "--tokenizer", "gpt5"], ["got 'gpt5'"]),
        (["MODEL", "--dtype", "fp8"], ["--dtype", "fp8"]),
        pytest.param(
            ["MODEL", "--tokenizer", "byte", "--draft", "nowhere"],
            ["nowhere is not a checkpoint"],
            marks=needs_engine,
        ),
    ],
    ids=["checkpoint", "none", "top_p", "tokens", "tokenizer", "dtype", "draft"],
)
def test_bad_flags(args: list, words: list[str], model: Path, capsys: Capture) -> None:
    refused(run(capsys, "chat", *(model if arg == "MODEL" else arg for arg in args)), *words)


def test_closed_stdin(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    refused(run(capsys, "chat", model), "standard input, which is closed")


def test_seeds_wrap_around(
    model: Path, spoken: list, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    lines = f"/seed {2**63 - 1}\na\n/retry\n/retry\n"
    assert piped(lines, monkeypatch, capsys, model)[:2] == (0, "one\ntwo\nthree\n")
    assert [options["seed"] for _, options in spoken] == [2**63 - 1, -(2**63), 1 - 2**63]


def interactive(
    lines: list[str], model: object, monkeypatch: pytest.MonkeyPatch, *pieces: object
) -> Conversation:
    """Run a session in which the model writes one list of pieces per turn and raises exceptions.

    Return the conversation that the session ends with.
    """
    turns = iter(pieces)

    def stream(*_: object, **__: object) -> Iterator[int]:
        for piece in next(turns):
            if isinstance(piece, BaseException):
                raise piece
            yield from BYTE.encode(piece)

    monkeypatch.setattr(conversation, "stream", stream)
    talk = Conversation(Template.parse(QUESTIONS), BYTE)
    session = chat._Session(model, talk, {"seed": 0, "max_new_tokens": 20}, {}, False)
    session.interactive = True
    session.run(lines)
    return talk


@pytest.mark.parametrize(
    "error", [RuntimeError("no\nluck"), OSError("no"), MemoryError("no")], ids=repr
)
def test_a_session_outlives_a_failed_reply(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Text from before the failure stays; if the reply did not begin, the prompt is dropped too."""
    pieces = [["yes"], [error], ["so ", error], ["no"]]
    talk = interactive(["a", "b", "c", "d"], random_model(block_size=SIZE), monkeypatch, *pieces)
    assert text_of(talk.ids) == "Q: a\nA:yes\nQ: c\nA:so \nQ: d\nA:no"
    out, err = capsys.readouterr()
    assert out == "yes\nso\nno\n"
    assert err == 2 * (str(error).partition("\n")[0] + "\n")


ESCAPES = "a\x1b]0;x\x07\x00\x7f\x9b2J\t\rb\nc\xa0é"
HARMLESS = "a\ufffd]0;x\ufffd\ufffd\ufffd\ufffd2J\t\ufffdb\nc\xa0é"


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_a_terminal_gets_no_control_characters(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    path = tmp_path / "kept.jsonl"
    interactive(["hi", f"/save {path}"], random_model(block_size=SIZE), monkeypatch, [ESCAPES])
    assert capsys.readouterr().out == f"{HARMLESS if terminal else ESCAPES}\n"
    assert json.loads(path.read_text())["completion"] == ESCAPES


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_shows_a_terminal_no_control_characters(
    beams: int, terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    tiny = random_model(vocab_size=257)
    with torch.no_grad():  # so that it writes ESC and nothing else
        tiny.ln_f.weight.fill_(0.0)
        tiny.ln_f.bias.fill_(1.0)
        tiny.wte.weight[0x1B] = 9.0
    tiny.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    args = ["--prompt", "\x1b[2Ja", "--temperature", 0] if beams == 1 else ["--prompt", "\x1b[2Ja"]
    args += ["--num-beams", beams, "--max-new-tokens", 3, "--tokenizer", "byte", "--stats", "off"]
    shown = "\ufffd[2Ja\ufffd\ufffd\ufffd\n" if terminal else "\x1b[2Ja\x1b\x1b\x1b\n"
    assert run(capsys, "generate", tmp_path / "model", *args) == (0, shown, "")


@needs_engine
@pytest.mark.parametrize("command", ["chat", "generate"])
def test_a_draft_of_another_vocabulary(
    command: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A draft with another vocabulary is refused before anything is written."""
    random_model(vocab_size=300).save_pretrained(tmp_path / "other")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    prompt = ["--prompt", "a"] if command == "generate" else []
    args = [model, "--tokenizer", "byte", "--draft", tmp_path / "other", *prompt]
    result = run(capsys, command, *args)
    refused(result, "draft has a vocabulary of 300 tokens, the model one of 257")
    assert not result[1]


@needs_engine
def test_replies_are_what_generate_writes(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A reply equals `generate` on the whole context, though only new tokens are computed."""
    args = [model, "--max-new-tokens", 12, "--seed", 5, "--stats", "on", "--dtype", "int8"]
    code, output, err = piped("ab\n/temperature 0\ncd\n", monkeypatch, capsys, *args)
    assert code == 0
    engine, ids, replies = Engine(model, "int8"), BYTE.encode("Q: ab\nA:"), []
    for options in ({"temperature": 0.8, "top_p": 0.95, "seed": 5}, {"temperature": 0}):
        whole = engine.generate([ids], 12, **options)[0]
        assert len(whole) == len(ids) + 12
        replies.append(BYTE.decode(whole[len(ids) :]).strip())
        ids = whole + BYTE.encode("\nQ: cd\nA:")
    assert output == "".join(f"{reply}\n" for reply in replies)
    line = r"\[\d+ tokens, [\d.]+ tokens/s, [\d.e-]+ GB/s of weights; prompt \d+ tokens in .* s\]"
    assert re.fullmatch(f"{line}\ntemperature is 0.0\n{line}\n", err)


def _take_terminal() -> None:
    """Make ^C a signal again, even if the tests' own process ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """A chat session in its own terminal."""

    def __init__(self, *args: object, **environment: str) -> None:
        self.screen, (self._file, child) = "", pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gptfast", "chat", *map(str, args)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", **environment},
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(child)

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def wait(self, pattern: str) -> str:
        """Wait for the pattern; take the text up to its end off the screen and return it."""
        end = time.monotonic() + 60
        while not (found := re.search(pattern, self.screen)):
            assert time.monotonic() < end and self._read(), self.screen
        before, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return before

    def press(self, key: str, pattern: str) -> str:
        """Press a control key until the screen answers; return what `wait` returns.

        A key that arrives between the prompt and readline's first look at the keyboard is lost.
        """
        end = time.monotonic() + 60
        while not re.search(pattern, self.screen) and time.monotonic() < end:
            self.type(key)
            again = time.monotonic() + 2
            while not re.search(pattern, self.screen) and time.monotonic() < again:
                self._read()
        return self.wait(pattern)

    def _read(self) -> bool:
        """Read what the session has written; return whether the session still runs."""
        if select.select([self._file], [], [], 0.1)[0]:
            try:
                self.screen += os.read(self._file, 65536).decode("utf-8", "replace")
            except OSError:  # Linux raises it when nobody has the other end open
                return False
        return True

    def end(self) -> int:
        """Press Ctrl-D until the session ends, as `press` does; return its exit code."""
        end = again = time.monotonic()
        try:
            while self._read():
                now = time.monotonic()
                assert now < end + 60, self.screen
                if now >= again:
                    self.type("\x04")
                    again = now + 2
            return self.process.wait(60)
        finally:
            self.process.kill()
            os.close(self._file)


@needs_engine
def test_a_session_in_a_terminal(model: Path, tmp_path: Path) -> None:
    cache = {"GPTFAST_CACHE": str(tmp_path / "cache")}
    args = [model, "--tokenizer", "byte", "--template", "{prompt} ", "--max-new-tokens", 10**6]
    args += ["--seed", 0]
    terminal = Terminal(*args, **cache)
    begin = terminal.wait("> ")
    assert "a context of 96 tokens. /help lists the commands" in begin and "\x1b[2m" in begin
    terminal.type("the first\r")
    terminal.wait("the first\r\n")
    terminal.wait(r"\S[^>]*\S")  # the model is writing
    terminal.type("\x03")
    assert "tokens/s" in terminal.wait(r"\n(\x1b\[\?2004h)?> ")
    terminal.type("/nope\r")
    terminal.wait("there is no /nope; /help lists the commands")
    terminal.type(f"/max_new_tokens 5\r/save {tmp_path / 'kept.jsonl'}\r")
    terminal.wait("max_new_tokens is 5")
    terminal.wait(r"kept.jsonl[^\n]*\n[^\n]*> ")
    terminal.type("half a line")
    terminal.wait("half a line")
    terminal.press("\x03", r"\n[^\n]*> ")  # Ctrl-C with text on the line
    terminal.press("\x03", r"\n[^\n]*> ")  # and with none
    terminal.type("/seed\r")
    terminal.wait("seed is 0")
    terminal.wait("> ")
    assert terminal.end() == 0
    record = json.loads((tmp_path / "kept.jsonl").read_text())
    assert record["prompt"] == "the first " and record["completion"]

    (tmp_path / "cache" / "chat_history").chmod(0o644)
    again = Terminal(*args, "--stats", "off", **cache, NO_COLOR="1")
    assert "\x1b[2m" not in again.wait("> ")
    up = "\x1b[A"
    again.type(up * 5 + "\x01again \x05 and more\r")  # Ctrl-A and Ctrl-E go to the ends of the line
    again.wait(r"and more[^\n]*\n")
    again.wait(r"\S[^>]*\S")
    again.type("\x03")
    assert "tokens/s" not in again.wait("> ")
    assert again.end() == 0
    assert (tmp_path / "cache" / "chat_history").stat().st_mode & 0o777 == 0o600
    history = (tmp_path / "cache" / "chat_history").read_text().splitlines()
    assert history[0] == "the first" and history[-1] == "again the first and more"


def test_a_cache_that_cannot_be_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPTFAST_CACHE", str(tmp_path / "file" / "cache"))
    chat._open_history()()
    assert "lines cannot be kept for the next one" in capsys.readouterr().err
