"""The help of a command: what it does, examples, and its flags in words.

A command of many flags names those that people set first in `set_first`. Its help is these, on one
screen; --help-all has them all.
"""

import inspect
import re
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import replace

from gptfast.cli.flags import Flag, group_help

INDENT = 24
"""The column at which the text of a flag begins."""
MAX_WIDTH = 100
_MAX_EXAMPLES = 3
_MAX_DEFAULT = 24
_HELP = Flag("help", bool, 0, (), False, False, False, "Show this help.")
_BRIEF_HELP = replace(_HELP, help="Show the flags that people set first, on one screen.")
_HELP_ALL = replace(_HELP, name="help_all")


def help_text(command: str, owner: type, flags: Sequence[Flag]) -> str:
    """Return the help of a command, on one screen if it says which flags people set first.

    owner: its dataclass, whose docstring is the description. flags: those of the command.
    """
    set_first = getattr(owner, "set_first", ())
    if not set_first:
        return full_help(command, owner, flags)
    width = _width()
    summary, *others = (inspect.getdoc(owner) or "").split("\n\n")
    examples = [text for text in others if text.startswith("gptfast ")][:_MAX_EXAMPLES]
    named = {flag.name: replace(flag, help=_briefly(flag)) for flag in flags}
    positional = [flag for flag in named.values() if flag.positional]
    first = [named[name] for name in set_first]
    n = sum(not (flag.hidden or flag.positional) for flag in flags)
    parts = [f"usage: {_usage(command, flags)}", wrapped(summary, width), "\n".join(examples)]
    if positional:
        parts.append("arguments:\n" + _listed(positional, width))
    parts.append("what people set first:\n" + _listed(first, width))
    parts.append(f"gptfast {command} --help-all explains all {n} flags.")
    return "\n\n".join(parts) + "\n"


def _briefly(flag: Flag) -> str:
    """Return the beginning of a flag's help, with the default if that is short."""
    what, begin, default = flag.help.partition(" (default: ")
    if len(default) > _MAX_DEFAULT:
        begin = default = ""
    ends = r"[.;] " if flag.positional else r"[.;:] "
    return re.split(ends, what)[0].rstrip(".") + begin + default.rstrip(".")


def _width() -> int:
    return min(MAX_WIDTH, max(60, shutil.get_terminal_size().columns))


def full_help(command: str, owner: type, flags: Sequence[Flag]) -> str:
    """Return the help of a command with every flag, as `help_text`."""
    width = _width()
    shown = [flag for flag in flags if not flag.hidden]
    positional = [flag for flag in shown if flag.positional]
    own = [flag for flag in shown if not (flag.positional or flag.group)]
    set_first = getattr(owner, "set_first", ())
    own.sort(key=lambda flag: (not flag.required, flag.name not in set_first))
    texts = group_help(owner)
    parts = [f"usage: {_usage(command, flags)}", wrapped(inspect.getdoc(owner) or "", width)]
    if positional:
        parts.append("arguments:\n" + _listed(positional, width))
    helps = [_BRIEF_HELP, _HELP_ALL] if set_first else [_HELP]
    parts.append("flags:\n" + _listed([*helps, *own], width))
    for group in dict.fromkeys(flag.group for flag in shown if flag.group):
        about = textwrap.fill(texts.get(group, ""), width, break_on_hyphens=False)
        of_group = _listed([flag for flag in shown if flag.group == group], width)
        parts.append("\n\n".join(filter(None, (f"{group}:\n{about}".rstrip(), of_group))))
    return "\n\n".join(parts) + "\n"


def wrapped(text: str, width: int) -> str:
    """Return a text with its paragraphs wrapped. A command that stands alone stays one line."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(
        paragraph
        if paragraph.startswith("gptfast ")
        else textwrap.fill(paragraph, width, break_on_hyphens=False, break_long_words=False)
        for paragraph in paragraphs
    )


def _usage(command: str, flags: Sequence[Flag]) -> str:
    """Return the usage line: required flags and positional arguments; the help lists the rest."""
    required = [
        f"{flag.long} {flag.metavar}" for flag in flags if flag.required and not flag.positional
    ]
    positional = [
        flag.long + (" ..." if flag.count is None else "") for flag in flags if flag.positional
    ]
    return " ".join([f"gptfast {command}", *positional, *required, "[FLAGS]"])


def _listed(flags: Sequence[Flag], width: int) -> str:
    return "\n".join(_described(flag, width) for flag in flags)


def _described(flag: Flag, width: int) -> str:
    """Return a flag with its value, and its help beside or below it."""
    names = [flag.short] if flag.short else []
    names.append(flag.long)
    if flag.help.endswith("(default: on)"):
        names.append(f"--no-{flag.long[2:]}")
    if flag in (_HELP, _BRIEF_HELP):
        names.insert(0, "-h")
    metavar = "" if flag.positional else flag.metavar
    head = f"  {', '.join(names)} {metavar}".rstrip()
    space = " " * INDENT
    text = textwrap.fill(
        flag.help,
        width,
        initial_indent=space,
        subsequent_indent=space,
        break_on_hyphens=False,
    )
    if len(head) + 2 <= INDENT:
        return head + text[len(head) :] if text else head
    return f"{head}\n{text}" if text else head
