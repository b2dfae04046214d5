"""The steps that docs/finetuning.md prints, and the same with less training."""

import re
from pathlib import Path

TEXT = (Path(__file__).parents[1] / "docs" / "finetuning.md").read_text("utf-8")
# (language, content) of each fenced block: sh and python are the page's way, py is for programs of
# others, text is what is printed.
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
_FEWER = {
    "--max-steps 1000": "--max-steps 80",
    "--max-steps 400": "--max-steps 100",
    "--out runs/rates": "--jobs 3 --out runs/rates",
}


def shortened(command: str) -> str:
    """Return a command of the page with fewer steps of training."""
    for long, short in _FEWER.items():
        command = command.replace(long, short)
    return command
