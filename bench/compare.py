"""Compare the speed of two checkouts of this repository: operations, training step, generation.

python bench/compare.py OLD NEW [--only adamw,train] [--rounds 5] [--processes 3] [--quick]

OLD and NEW are directories that hold a built gptfast: each is the PYTHONPATH of a process of its
own. The two processes time the same calls in turn, and the one that waits is stopped. A ratio is
the median over all rounds of old / new: above 1 the new checkout is faster. Fresh processes are
started several times, because where a process has its memory changes its speed by some per cent.
OLD and NEW may be the same directory: the ratios then show the noise of this machine.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from compare_cases import CASES

MAX_CHANGE = 0.03
"""The largest slowdown of the new checkout for which the run does not fail."""


class Side:
    """A process that times one case with the gptfast of one checkout; stopped while it waits."""

    def __init__(self, directory: Path, name: str, quick: bool) -> None:
        script = Path(__file__).with_name("compare_cases.py")
        command = [sys.executable, script, directory, name, "quick" if quick else "full"]
        self.directory = directory
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(directory.resolve())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def _answer(self) -> object:
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            sys.exit(f"the process of {self.directory} ended with code {code}; see its error above")
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def seconds(self) -> float:
        """Return the seconds per call of one sample."""
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def _rounds(name: str, args: argparse.Namespace) -> Iterator[tuple[float, float]]:
    """Yield (old, new) seconds per call; the side that begins changes with each round."""
    for _ in range(args.processes):
        sides = []
        try:
            for directory in (args.old, args.new):
                sides.append(Side(directory, name, args.quick))
            for i in range(args.rounds):
                order = sides if i % 2 == 0 else sides[::-1]
                seconds = {side: side.seconds() for side in order}
                yield seconds[sides[0]], seconds[sides[1]]
        finally:
            for side in sides:
                side.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="a checkout with a built gptfast")
    parser.add_argument("new", type=Path, help="the checkout to compare with it")
    parser.add_argument("--only", default=",".join(CASES), help="comma-separated cases")
    parser.add_argument("--rounds", type=int, default=5, help="samples a process (default: 5)")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes (default: 3)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try the script")
    return parser


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"no case named {unknown[0]!r}; choose from {', '.join(CASES)}")
    print("| case | old | new | old / new | quartiles |\n|---|---|---|---|---|")
    slower = []
    for name in names:
        old, new = zip(*_rounds(name, args), strict=True)
        ratios = [a / b for a, b in zip(old, new, strict=True)]
        ratio = statistics.median(ratios)
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratio,) * 3
        costs = " | ".join(f"{1e3 * statistics.median(x):.3g} ms" for x in (old, new))
        print(f"| {name} | {costs} | {ratio:.3f} | {low:.3f} to {high:.3f} |", flush=True)
        if ratio < 1 - MAX_CHANGE:
            slower.append(name)
    if slower:
        sys.exit(f"more than {MAX_CHANGE:.0%} slower: {', '.join(slower)}")


if __name__ == "__main__":
    main()
