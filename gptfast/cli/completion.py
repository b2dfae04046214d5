"""`gptfast --completion SHELL`: a script by which a shell completes commands, flags and choices.

The script has all the words in it, because to ask the command at each press of Tab would import
PyTorch each time.
"""

from collections.abc import Mapping, Sequence

from gptfast.cli.flags import Flag, UsageError

SHELLS = ("bash", "zsh")
_BASH = """\
_gptfast() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=""
  if [ "$COMP_CWORD" = 1 ]; then
    words="{commands}"
  else
    case "${{COMP_WORDS[1]}} $before" in
{choices}
      *)
        case "${{COMP_WORDS[1]}} $word" in
{flags}
        esac ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _gptfast gptfast
"""


def completion_script(shell: str, commands: Mapping[str, Sequence[Flag]]) -> str:
    """Return the script for a shell, which completes file names where it knows no word.

    commands: the flags of each command. Raises UsageError for an unknown shell.
    """
    if shell not in SHELLS:
        raise UsageError(f"--completion takes {' or '.join(SHELLS)}, got {shell!r}")
    choices = [
        f'      "{name} {flag.long}") words="{" ".join(flag.choices)}" ;;'
        for name, flags in commands.items()
        for flag in flags
        if flag.choices and not flag.hidden and not flag.positional
    ]
    flags = [
        f'          "{name} -"*) words="{" ".join(_words(flags))}" ;;'
        for name, flags in commands.items()
    ]
    script = _BASH.format(
        commands=" ".join(commands), choices="\n".join(choices), flags="\n".join(flags)
    )
    return script if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{script}"


def _words(flags: Sequence[Flag]) -> list[str]:
    """Return the flags of a command as they are typed, with --no- for those that are on."""
    shown = [flag for flag in flags if not flag.hidden and not flag.positional]
    off = [f"--no-{f.long[2:]}" for f in shown if f.help.endswith("(default: on)")]
    return ["--help", "--help-all", *(flag.long for flag in shown), *off]
