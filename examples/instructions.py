"""From instructions with answers to a chat and a server, each step one command of `gptfast`.

python examples/instructions.py                 # some minutes on two cores, in runs/instructions
python examples/instructions.py --init gpt2     # an adapter beside GPT-2 (gptfast download gpt2)

The data are chats in OpenAI's form, one a line, which `gptfast train` reads as they are; a file of
yours takes their place with --data. The server needs pip install 'gptfast-torch[serve]'.
"""

import argparse
import json
import random
import shlex
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
QUESTIONS = (
    "Which day comes {side} {day}?",
    "Name the day {side} {day}.",
    "{day}: the day {side}?",
)
GPTFAST = [sys.executable, "-m", "gptfast"]


def write_data(path: Path) -> None:
    """Write questions about the days of the week as chats, a few times each."""
    chats = []
    for i, day in enumerate(DAYS):
        for side, step in (("before", -1), ("after", 1)):
            for question in QUESTIONS:
                answer = f"It is {DAYS[(i + step) % 7]}."
                asked = question.format(side=side, day=day)
                messages = [("user", asked), ("assistant", answer)]
                chats.append({"messages": [{"role": r, "content": text} for r, text in messages]})
    chats *= 4
    random.Random(0).shuffle(chats)
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats), "utf-8")


def quote(path: object) -> str:
    """Return a path as a shell takes it, whatever signs are in it."""
    return shlex.quote(str(path))


def gptfast(command: str, said: str | None = None) -> None:
    """Print a command and run it; said: what it reads from standard input."""
    print(f"\n$ gptfast {command}" + (f" <<< {said!r}" if said else ""), flush=True)
    subprocess.run([*GPTFAST, *shlex.split(command)], input=said, text=True, check=True)


def train_once(out: Path, flags: str) -> None:
    """Train a run with these flags, or continue it where it was stopped."""
    begun = (out / "checkpoints").is_dir()
    gptfast(f"train --out {quote(out)} {'--resume' if begun else flags}")


def train(out: Path, data: Path, init: str | None, steps: int) -> Path:
    """Train on the data, from the weights at `init` or from a small base; return the run."""
    options = f"--max-steps {steps} --batch-size 16 --sample-tokens 0"
    tuned = out / "tuned"
    if init is not None:  # large: an adapter is enough, and needs little memory
        train_once(tuned, f"--data {quote(data)} --init {quote(init)} --lora-rank 8 {options}")
        return tuned
    base = out / "base"
    shape = "--tokenizer byte --n-layer 2 --n-embd 64 --lr 5e-3"
    train_once(base, f"{shape} {options}")
    train_once(tuned, f"--data {quote(data)} --init {quote(base)} --lr 2e-3 {options}")
    return tuned


def ask_server(model: Path, question: str) -> str:
    """Serve a model, ask it through OpenAI's protocol, and return its answer."""
    command = f"serve {quote(model)} --port 0 --temperature 0"
    print(f"\n$ gptfast {command}", flush=True)
    server = subprocess.Popen([*GPTFAST, *shlex.split(command)], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        for line in server.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            if " at http://" in line:
                break
        else:
            raise SystemExit("the server did not start")
        address = line.split(" at ")[1].strip()
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": 40}
        request = urllib.request.Request(
            f"{address}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=60) as reply:
            return json.load(reply)["choices"][0]["message"]["content"]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/instructions"))
    parser.add_argument("--data", type=Path, help="a .jsonl file of chats or instructions")
    parser.add_argument("--init", help="a model to start from, such as gpt2")
    parser.add_argument("--steps", type=int, default=600)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    data = given.data or given.out / "chats.jsonl"
    if given.data is None:
        write_data(data)
    tuned = train(given.out, data, given.init, given.steps)
    question = "Which day comes after Monday?"
    gptfast(f"chat {quote(tuned)} --temperature 0", said=f"{question}\n")
    print(ask_server(tuned, question))


if __name__ == "__main__":
    main()
