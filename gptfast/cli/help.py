"""The help of a command: what it does, examples, and its flags in words."""

import inspect
import shutil
import textwrap
from collections.abc import Sequence

from gptfast.cli.flags import Flag, group_help

INDENT = 24
"""The column at which the text of a flag begins."""
MAX_WIDTH = 100
_HELP = Flag("help", bool, 0, (), False, False, False, "Show this help.")


def help_text(command: str, owner: type, flags: Sequence[Flag]) -> str:
    """Return the help of a command.

    owner: its dataclass, whose docstring is the description. flags: those of the command.
    """
    width = min(MAX_WIDTH, max(60, shutil.get_terminal_size().columns))
    shown = [flag for flag in flags if not flag.hidden]
    positional = [flag for flag in shown if flag.positional]
    own = [flag for flag in shown if not (flag.positional or flag.group)]
    own.sort(key=lambda flag: not flag.required)
    texts = group_help(owner)
    parts = [f"usage: {_usage(command, flags)}", wrapped(inspect.getdoc(owner) or "", width)]
    if positional:
        parts.append("arguments:\n" + _listed(positional, width))
    parts.append("flags:\n" + _listed([_HELP, *own], width))
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
    if flag is _HELP:
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
