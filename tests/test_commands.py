"""Test every command at toy size: whole, interrupted, on a full disk, diverging, and misused."""

import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from commands import SEED_LINE, TINY, Capture, done, refused, rows, run, start, train
from helpers import (
    differing,
    disk_of,
    parameters,
    random_model,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptfast import GPT, get_tokenizer
from gptfast.cli import main
from gptfast.data.embedded import embedded_text
from gptfast.data.sources import load_data
from gptfast.evaluate.loss import perplexity
from gptfast.ops.backend import EXTENSION
from gptfast.weights.checkpoint import checkpoints

BYTE = get_tokenizer("byte")
NO_LOOK = ["--sample-tokens", "0", "--log-interval", "1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(embedded_text()[:3000], "utf-8")
    return path


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output directory of a finished run of 40 steps."""
    out = tmp_path_factory.mktemp("trained") / "out"
    args = ["--data", str(text), "--out", str(out), "--max-steps", "40", "--lr", "0.01"]
    assert main(["train", *TINY, *args]) == 0
    return out


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def losses(out: str | Path) -> list[float]:
    return [row["loss"] for row in rows(Path(out)) if "loss" in row]


def jsonl(path: Path, *records: dict[str, str]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")


PROMPTED = [{"prompt": f"{n} + {n} =", "completion": f" {2 * n}"} for n in range(60)]


@pytest.mark.parametrize("command", ["prepare", "train"])
def test_an_empty_file_in_a_directory(command: str, text: Path) -> None:
    """Its line is on stderr, once."""
    Path("data").mkdir()
    Path("data/text.txt").write_bytes(text.read_bytes())
    Path("data/none.md").touch()
    own = ["--tokenizer", "byte"] if command == "prepare" else [*TINY, "--max-steps", "1"]
    with start(command, "--data", "data", "--out", "out", *own) as process:
        _, err = process.communicate()
    assert process.returncode == 0
    assert err.splitlines()[0] == "skipped data/none.md: it is empty" and err.count("skipped") == 1


@pytest.mark.parametrize("kind", ["file", "directory", "glob", "jsonl", "prompts"])
def test_prepared_data_trains_as_the_text_does(
    kind: str, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_bytes(text.read_bytes())
    (folder / "more" / "b.md").write_text("Another document.\n" * 9)
    jsonl(folder / "more" / "c.jsonl", *({"text": f"line {n} says {n * n}"} for n in range(40)))
    jsonl(tmp_path / "prompts.jsonl", *PROMPTED)
    data, documents = {
        "file": ("texts/a.txt", "1"),
        "directory": ("texts", "42"),
        "glob": ("texts/**/*.[tm]*", "2"),
        "jsonl": ("texts/more/c.jsonl", "40"),
        "prompts": ("prompts.jsonl", "60"),
    }[kind]
    split = ["--split", 0.8, 0.1, 0.1]
    output = done(
        capsys, "prepare", "--data", data, "--out", "tokens", "--tokenizer", "byte", *split
    )
    assert output.startswith(f"{documents} documents; tokens: train ")
    assert "gptfast train --data tokens" in output
    direct = [*TINY, *NO_LOOK, "--max-steps", 3]
    done(capsys, "train", *direct, "--data", data, "--out", "direct", *split)
    # The prepared data records its tokenizer.
    done(capsys, "train", *direct[2:], "--data", "tokens", "--out", "prepared")
    assert losses("prepared") == losses("direct")
    last = [rows(Path(out))[-1] for out in ("prepared", "direct")]
    for name in ("val_loss", "test_loss", "tokens"):
        assert last[0][name] == last[1][name]


def test_a_trained_tokenizer(text: Path, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("tokenizers")
    output = done(capsys, "tokenizer", "--data", text, "--out", "vocabulary", "--vocab-size", 300)
    assert output.strip() == "done: 300 tokens in vocabulary; use it as --tokenizer vocabulary"
    args = ["--tokenizer", "vocabulary", "--data", text]
    output = done(capsys, "prepare", *args, "--out", "tokens")
    n = len(get_tokenizer("vocabulary").encode(text.read_text()))
    assert 300 < n < 3000 * 0.8
    counts = [int(word.rstrip(",").replace(",", "")) for word in output.split()[4:8:2]]
    assert sum(counts) == n
    sizes = [*TINY[2:], "--max-steps", 2]
    done(capsys, "train", *sizes, "--data", "tokens", "--out", "run")
    assert GPT.from_pretrained("run").config.vocab_size == 300
    output = done(capsys, "generate", "run", "--prompt", "the value", "--max-new-tokens", 3)
    assert output.startswith("the value")


def test_eval_by_hand(trained: Path, text: Path, capsys: Capture) -> None:
    model, tokens = GPT.from_pretrained(trained), BYTE.encode(text.read_text())

    def measured(*args: object) -> str:
        return done(capsys, "eval", trained, *args).strip()

    def expected(source: object, T: int = 16) -> str:
        """Return the output for losses of every token but the first, in adjacent windows of T."""
        ids = torch.as_tensor(source.tensor() if hasattr(source, "tensor") else source)
        nats = 0.0
        for i in range(0, len(ids) - 1, T):
            x, y = ids[i : i + T + 1][:-1], ids[i + 1 : i + T + 1]
            log_p = model(x[None])[0].log_softmax(-1)
            nats -= log_p.gather(1, y[:, None]).sum().item()
        loss, n_bytes = nats / (len(ids) - 1), int((ids[1:] < 256).sum())
        return (
            f"loss {loss:.4f} nats per token, perplexity {perplexity(loss):.2f}, "
            f"{nats / math.log(2) / n_bytes:.4f} bits per byte"
        )

    assert measured("--data", text) == expected(tokens)
    assert measured("--data", text, "--max-length", 5, "--batch-size", 3) == expected(tokens, 5)
    prepare = ["--data", text, "--tokenizer", "byte", "--split", 0.5, 0.3, 0.2]
    done(capsys, "prepare", *prepare, "--out", "tokens")
    parts = load_data(["tokens"], BYTE)
    of_parts = [expected(part) for part in parts]
    assert len(set(of_parts)) == 3
    for name, of_part in zip(("train", "val", "test"), of_parts, strict=True):
        assert measured("--data", "tokens", "--part", name) == of_part
    assert measured("--data", "tokens") == of_parts[1]


def test_eval_of_completions(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    """Prompts are not scored: other prompts change only the context of the completions."""
    jsonl(tmp_path / "a.jsonl", {"prompt": "ab", "completion": "cd"})
    output = done(capsys, "eval", trained, "--data", "a.jsonl")
    logits = GPT.from_pretrained(trained)(torch.tensor([BYTE.encode("abcd")]))[0].log_softmax(-1)
    targets = [*BYTE.encode("cd"), BYTE.eot]
    loss = -sum(logits[1 + i, target].item() for i, target in enumerate(targets)) / 3
    assert output.startswith(f"loss {loss:.4f} ")


def test_plot_two_runs(trained: Path, text: Path, capsys: Capture) -> None:
    done(capsys, "train", *TINY, "--data", text, "--out", "other", "--max-steps", 2)
    for name in ("runs.png", "runs.svg"):
        output = done(capsys, "plot", trained, "other", "--out", name, "--x", "step")
        assert output == f"done: see {name}\n"
    assert Path("runs.png").read_bytes().startswith(b"\x89PNG")
    assert "other" in Path("runs.svg").read_text() and "out" in Path("runs.svg").read_text()


def test_search_by_grid(text: Path, capsys: Capture) -> None:
    """One trial fails and the others are ranked; a second call trains nothing again."""
    args = [*TINY, "--data", text, "--max-steps", 5, "--sample-tokens", 0, "--out", "search"]
    grid = ["--grid", "lr=1e-5,1e-1,1e30", "--jobs", 3]
    code, output, err = run(capsys, "search", *grid, *args)
    assert (code, err) == (0, "")
    results = json.loads(Path("search/results.json").read_text())
    assert [r["status"] for r in results] == ["done", "done", "failed"]
    assert [r["settings"]["lr"] for r in results] == [1e-1, 1e-5, 1e30]
    assert "loss is nan at step 2" in results[2]["reason"]
    assert f"best: lr=0.1 ({Path('search/trial-002')}); see " in output
    assert results[0]["val_loss"] == min(
        row["val_loss"] for row in rows(Path("search/trial-002"))[1:] if "val_loss" in row
    )
    assert Path("search/search.png").stat().st_size > 1000
    begun = [
        path.stat().st_mtime_ns for path in sorted(Path("search").glob("trial-*/metrics.jsonl"))
    ]
    refused(run(capsys, "search", "--grid", "lr=1", *args), "holds another search")
    # Write a result for the failed trial by hand; then nothing is left to do.
    write = Path("search/trial-003/result.json")
    write.write_text(json.dumps(results[1] | {"trial": "trial-003"}))
    output = done(capsys, "search", *grid, *args)
    assert "3 of 3 trials are done already" in output
    again = [
        path.stat().st_mtime_ns for path in sorted(Path("search").glob("trial-*/metrics.jsonl"))
    ]
    assert again == begun


def test_search_at_random_and_a_range_of_rates(text: Path, capsys: Capture) -> None:
    args = [*TINY, "--data", text]
    ranges = ["--random", "lr=1e-3:1e-1:log", "batch_size=2:6", "--trials", 2, "--jobs", 2]
    output = done(capsys, "search", *ranges, *args, "--max-steps", 3, "--out", "random")
    results = json.loads(Path("random/results.json").read_text())
    assert [r["status"] for r in results] == ["done", "done"]
    assert results[0]["val_loss"] <= results[1]["val_loss"]
    for result in results:
        assert 1e-3 <= result["settings"]["lr"] <= 1e-1
        assert result["settings"]["batch_size"] in range(2, 7)
    assert f"best: lr={results[0]['settings']['lr']:.4g} " in output
    output = done(
        capsys, "search", "--lr-range", "1e-4", 10, *args, "--max-steps", 40, "--out", "range"
    )
    rates = [row["lr"] for row in rows(Path("range/trial-001")) if "lr" in row]
    assert rates == sorted(rates) and rates[0] >= 1e-4
    suggested = float(output.split("suggested: ")[1].split(",")[0])
    assert 1e-4 < suggested < 10
    assert Path("range/lr_range.png").exists()


def wait_for(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def first_row(out: str) -> Callable[[], bool]:
    """Return whether training has begun in that directory."""
    path = Path(out) / "metrics.jsonl"
    return lambda: path.exists() and path.stat().st_size > 0


ENDLESS = ["--max-steps", "1000000", "--sample-tokens", "0", "--log-interval", "1000000"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_search_is_interrupted_and_goes_on(
    number: signal.Signals, text: Path, capsys: Capture
) -> None:
    """Ctrl-C reaches search and trial, SIGTERM only the search; the trial loses no step."""
    args = [*TINY, "--data", text, *ENDLESS, "--out", "search", "--eval-interval", 10**6]
    process = start("search", "--grid", "seed=1", *args, "--early-stopping", 1)
    wait_for(first_row("search/trial-001"), process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    output, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "trial-001 interrupted" in output
    assert "stopped; the same command continues search" in output
    assert err.splitlines()[-1] == "gptfast: interrupted"
    assert "Traceback" not in output + err
    log = Path("search/trial-001/log.txt").read_text()
    assert "all is saved; --resume continues" in log and "Traceback" not in log
    if number == signal.SIGTERM:
        return
    saved = int(checkpoints("search/trial-001")[-1].name.removeprefix("step-"))
    # The search refuses another end of training, so set it by hand.
    spec = Path("search/search.json")
    spec.write_text(spec.read_text().replace("1000000", str(saved + 3)))
    args = [str(saved + 3) if arg in ("1000000", 10**6) else arg for arg in args]
    output = done(capsys, "search", "--grid", "seed=1", *args, "--early-stopping", 1)
    assert "best: seed=1" in output
    log = Path("search/trial-001/log.txt").read_text()
    assert f"at step {saved}\n" in log.partition("resumed from")[2]
    assert rows(Path("search/trial-001"))[-1]["step"] == saved + 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_training_is_interrupted_and_goes_on(
    number: signal.Signals, text: Path, capsys: Capture
) -> None:
    process = start("train", *TINY, "--data", text, *ENDLESS, "--out", "run")
    wait_for(first_row("run"), process)
    os.killpg(process.pid, number)
    output, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    name = number.name
    assert err.strip() == f"{name}: finishing the step and saving; Ctrl-C stops at once"
    last = output.splitlines()[-1]
    saved = int(checkpoints("run")[-1].name.removeprefix("step-"))
    assert last == f"{name}: stopped at step {saved}, all is saved; --resume continues"
    output = done(capsys, "train", "--out", "run", "--resume", "--max-steps", saved + 2)
    assert f"at step {saved}\n" in output and "done: see" in output


def test_a_second_interrupt_leaves_at_once(text: Path) -> None:
    process = start("train", *TINY, "--data", text, *ENDLESS, "--out", "run")
    wait_for(first_row("run"), process)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.001)
    output, err = process.communicate(timeout=60)
    if "all is saved" not in output:  # else the step ended before the second signal came
        assert process.returncode == 130
        assert err.splitlines()[-1] == "gptfast: interrupted"
    assert "Traceback" not in output + err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system with room for one or two checkpoints of the toy model."""
    yield from disk_of("300k", tmp_path / "disk")


def test_a_full_disk(small_disk: Path, text: Path, tmp_path: Path, capsys: Capture) -> None:
    args = ["--data", text, "--max-steps", 9, "--checkpoint-interval", 1, "--keep", 9]
    result = train(capsys, *args, "--out", small_disk / "run")
    refused(result, "cannot save", "No space left on device", "earlier checkpoints are intact")
    assert checkpoints(small_disk / "run")
    (tmp_path / "big.txt").write_text("a lot of text. " * 40_000)
    result = run(
        capsys,
        *("prepare", "--data", tmp_path / "big.txt", "--tokenizer", "byte"),
        *("--out", small_disk / "tokens"),
    )
    refused(result, "cannot write", "No space left on device")
    assert not (small_disk / "tokens").exists()


def test_divergence(text: Path, capsys: Capture) -> None:
    """At such a rate the first step really makes the loss infinite or NaN."""
    args = ["--data", text, "--max-steps", 9, "--lr", "1e30", "--out", "run"]
    words = ["loss is nan at step 2, on batch 1 (epoch 0): windows ", " at tokens ", "lower --lr"]
    refused(train(capsys, *args), *words, "the checkpoint of step 1 is in run")
    assert [path.name for path in checkpoints("run")] == ["step-00000001"]
    assert all(p.isfinite().all() for p in GPT.from_pretrained("run").parameters())
    refused(train(capsys, *args, "--resume"), *words)
    skip = ["--resume", "--nonfinite", "skip", "--sample-tokens", 0]
    output = done(capsys, "train", "--out", "run", *skip)
    assert output.count("skipped: loss is nan") == 8


def test_generate_options(trained: Path, capsys: Capture) -> None:
    def text_of(*options: object) -> str:
        args = ("--prompt", "The ", "--max-new-tokens", 20, *options)
        output = done(capsys, "generate", trained, *args)
        return output.removesuffix("\n")

    greedy = text_of("--temperature", 0)
    assert greedy.startswith("The ") and len(greedy) == 24
    assert text_of("--num-beams", 1, "--temperature", 0) == greedy
    assert text_of("--num-beams", 4) == text_of("--num-beams", 4, "--seed", 9)
    # Beam search draws nothing, which is what a temperature of 0 asks for.
    assert text_of("--num-beams", 4) == text_of("--num-beams", 4, "--temperature", 0)
    off = ["--top-k", 0, "--top-p", 1, "--min-p", 0]
    assert text_of("--num-beams", 4) == text_of("--num-beams", 4, *off)
    assert text_of("--seed", 3) == text_of("--seed", 3, *off) != text_of("--seed", 3, "--top-k", 2)
    # The stop is cut off where it begins.
    cut = text_of("--temperature", 0, "--stop", greedy[9:12], "never there")
    assert cut == greedy[: 4 + greedy[4:].index(greedy[9:12])]
    punished = text_of("--temperature", 0, "--repetition-penalty", 50.0)
    assert len(set(punished[4:])) == len(punished[4:]) > 10
    table = text_of("--temperature", 0, "--logprobs").splitlines()
    assert [line.split(maxsplit=1)[1] for line in table] == [repr(c) for c in greedy[4:]]
    logits = GPT.from_pretrained(trained)(torch.tensor([BYTE.encode("The ")]))[0, -1]
    assert abs(float(table[0].split()[0]) - logits.log_softmax(-1).max().item()) < 1e-4


def test_special_tokens(trained: Path, capsys: Capture) -> None:
    """A special token is plain text by default; if it is allowed, it is one token."""

    def first(*options: object) -> float:
        args = ("--prompt", "<|endoftext|>", "--temperature", 0, "--logprobs", *options)
        return float(done(capsys, "generate", trained, *args).split()[0])

    model = GPT.from_pretrained(trained)
    letters, special = (
        model(torch.tensor([ids]))[0, -1].log_softmax(-1).max().item()
        for ids in (BYTE.encode("<|endoftext|>")[-16:], [BYTE.eot])
    )
    assert abs(first() - letters) < 1e-4
    assert abs(first("--allow-special", "<|endoftext|>") - special) < 1e-4
    refused(
        run(capsys, "generate", trained, "--prompt", "a", "--allow-special", "<|im|>"),
        "there is no special token '<|im|>'",
    )


def test_training_flags(text: Path, tmp_path: Path, capsys: Capture) -> None:
    """Numbers show that each flag does what it says."""

    def result(name: str, *flags: object) -> list[float]:
        args = ["--data", text, "--max-steps", 6, *NO_LOOK, "--lr", "0.01", "--warmup-steps", 0]
        done(capsys, "train", *TINY, *args, "--out", name, *flags)
        return losses(name)

    def rates(name: str) -> list[float]:
        return [row["lr"] for row in rows(Path(name)) if "lr" in row]

    plain = result("plain")
    result("constant", "--schedule", "constant")
    assert rates("constant") == [0.01] * 6
    result("wsd", "--schedule", "wsd", "--decay-steps", 2, "--min-lr", 0)
    assert rates("wsd")[:4] == [0.01] * 4 and rates("wsd")[5] < rates("wsd")[4] < 0.01
    result("up", "--schedule", "exponential", "--min-lr", "1e-4")
    assert rates("up") == sorted(rates("up")) and rates("up")[0] < 1e-3
    assert result("checkpointed", "--activation-checkpointing") == pytest.approx(plain, rel=1e-5)
    halves = result("halves", "--batch-size", 2, "--accumulation-steps", 2)
    assert halves == pytest.approx(plain, rel=1e-5)
    bf16 = result("bf16", "--precision", "bf16")
    assert bf16 != plain and bf16 == pytest.approx(plain, rel=0.02)
    result("frozen", "--freeze", "wte.*", "h.*.attn.*", "--checkpoint-interval", 1, "--keep", 9)
    first, last = (GPT.from_pretrained(checkpoints("frozen")[i]) for i in (0, -1))
    changed = differing(parameters(first), parameters(last))
    assert changed and not [n for n in changed if n.startswith("wte.") or ".attn." in n]
    assert {n.split(".")[-2] for n in changed} >= {"wpe", "c_fc", "ln_f"}
    # This rate undoes the training: no later evaluation is better than the first.
    stopping = ["--early-stopping", 2, "--eval-interval", 1, "--max-steps", 99]
    result("stopped", "--lr", 3.0, "--schedule", "constant", *stopping)
    evaluated = [row["val_loss"] for row in rows(Path("stopped"))[1:]]
    assert len(evaluated) < 99 and min(evaluated) == min(evaluated[:-2])
    assert min(evaluated[-2:]) >= min(evaluated)


@pytest.mark.parametrize("name", ["info", "generate"])
def test_python_m_gptfast(name: str) -> None:
    process = start(name)
    output, err = process.communicate(timeout=60)
    if name == "info":
        assert (process.returncode, err) == (0, "") and output.startswith("gptfast ")
    else:
        refused((process.returncode, output, err), "required", "--prompt")


@pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")
def test_an_instruction_set_nobody_has() -> None:
    process = start("info", GPTFAST_ISA="nonsense")
    output, err = process.communicate(timeout=60)
    refused((process.returncode, output, err), "'nonsense' is not one this CPU has", "GPTFAST_ISA")
    assert output == ""


HUGE = (2**63, 10**30, -(10**30))
INTEGER_FLAGS = {
    "train": [
        "vocab-size block-size n-layer n-head n-embd max-steps epochs accumulation-steps",
        "warmup-steps decay-steps eval-interval eval-batches early-stopping log-interval",
        "checkpoint-interval keep sample-tokens seed batch-size max-length stride",
    ],
    "generate": ["max-new-tokens top-k num-beams seed"],
    "prepare": ["shard-tokens"],
    "tokenizer": ["vocab-size"],
    "eval": ["max-length"],
}
CASES = [
    (command, f"--{flag}")
    for command, lines in INTEGER_FLAGS.items()
    for flag in " ".join(lines).split()
]


@pytest.mark.parametrize(("command", "flag"), CASES, ids=lambda value: value)
def test_integers_beyond_int64(
    command: str, flag: str, trained: Path, text: Path, capsys: Capture
) -> None:
    base: list[object] = {
        "train": [*TINY, "--data", text, "--out", "out"],
        "generate": [trained, "--prompt", "a"],
        "prepare": ["--data", text, "--out", "out", "--tokenizer", "byte"],
        "tokenizer": ["--data", text, "--out", "out"],
        "eval": [trained, "--data", text],
    }[command]
    for value in HUGE:
        named = flag.strip("-").split("-")[0]
        if (command, flag) == ("eval", "--stride") and value > 0:
            named = "windows"
        refused(run(capsys, command, *base, flag, value), named)
    assert not Path("out").exists()


def test_more_memory_than_there_is(text: Path, capsys: Capture) -> None:
    result = train(capsys, "--data", text, "--out", "out", "--n-embd", 2**31 - 2)
    refused(result)
    assert not Path("out").exists()


BAD_COMMANDS = {
    "prepare --data nowhere --out out": ["cannot read nowhere"],
    "prepare --data text.txt": ["--out"],
    "prepare --out out": ["--data"],
    "prepare --data --out out": ["--data takes one or more values, FILE ..."],
    "prepare --data text.txt --out text.txt": ["text.txt already exists"],
    "prepare --data text.txt --out out --split 0.5": ["sum to 1"],
    "prepare --data text.txt --out out --split nan 1": ["sum to 1"],
    "prepare --data text.txt --out out --split 0.4 0.3 0.2 0.1": ["one to three shares"],
    "prepare --data text.txt --out out --workers 0": ["workers must be an integer >= 1, got 0"],
    "prepare --data text.txt --out out --shard-tokens 0": ["shard_tokens must be"],
    "prepare --data bad.jsonl --out out": ["bad.jsonl:2", "no field 'text', only body"],
    "prepare --data mixed.jsonl --out out": ["mixed.jsonl:2", "one kind at a time"],
    "prepare --data text.txt --out out --tokenizer gpt5": ["got 'gpt5'"],
    "tokenizer --data nowhere --out out": ["cannot read nowhere"],
    "tokenizer --data text.txt --out out --vocab-size 100": ["vocab_size must be", "got 100"],
    "eval nowhere --data text.txt": ["nowhere is not a checkpoint"],
    "eval RUN": ["--data"],
    "eval RUN --data": ["--data takes one or more values, FILE ..."],
    "eval RUN --data nowhere": ["cannot read nowhere"],
    "eval RUN --data text.txt --max-length 17": ["from 1 to block_size=16, got 17"],
    "eval RUN --data text.txt --max-length 0": ["max_length must be an integer >= 1, got 0"],
    "eval RUN --data text.txt --batch-size 0": ["batch_size must be an integer >= 1, got 0"],
    "eval RUN --data text.txt --part middle": ["--part", "middle"],
    "eval RUN --data tokens --part test": ["tokens has no part test"],
    "plot": ["no runs to plot"],
    "plot nowhere": ["nowhere cannot be read"],
    "plot RUN --out x.bmp": ["must end in one of .png, .pdf, .svg, got 'x.bmp'"],
    "plot RUN --out text.txt/x.png": ["cannot write text.txt/x.png"],
    "plot RUN --x time": ["--x", "time"],
    "search": ["give one of --grid, --random and --lr-range"],
    "search --grid lr=1 --lr-range 1e-3 1": ["give one of --grid, --random and --lr-range"],
    "search --grid lr": ["'lr' is not of the form NAME=VALUES"],
    "search --grid lr=1,,2": ["empty value"],
    "search --grid rl=1": ["there is no field 'rl'"],
    "search --grid lr=fast": ["lr must be a number, got 'fast'"],
    "search --grid lr=-1": ["lr must be a finite number > 0, got -1.0"],
    "search --grid n_head=3": ["n_embd must be divisible by n_head"],
    "search --grid max_steps=1 epochs=2": ["max_steps or epochs, not both"],
    "search --grid lr=1 --jobs 0 --out out": ["jobs must be an integer >= 1, got 0"],
    "search --grid lr=1 --resume": ["search takes no resume", "the same command continues"],
    "search --grid lr=1 --no-resume": ["search takes no resume", "give another --out"],
    "search --grid lr=1 --config resume.toml": ["search takes no resume", "Leave resume out"],
    "search --random lr=2:1": ["empty range"],
    "search --random lr=1:2 --trials 0": ["trials must be an integer >= 1, got 0"],
    "search --random lr=0:1:log": ["must start above 0"],
    "search --lr-range 1 0.1": ["the rates must be 0 < LOW < HIGH, got 1.0 and 0.1"],
    "search --lr-range 1": ["--lr-range"],
    "train --max-length 0 --out out": ["max_length must be an integer >= 1, got 0"],
    "train --stride 0 --out out": ["stride must be an integer >= 1, got 0"],
    "train --tokenizer= --out out": ["has no vocab.bpe"],
    "train --config= --out out": ["cannot read"],
    "train --init= --out out": ["is not a checkpoint"],
    "train --freeze nothing.* --out out": ["no parameter matches 'nothing.*'"],
    "train --out=": ["out must name a directory, got ''"],
    "generate RUN --prompt a --temperature 1e300": ["temperature must be a finite number"],
    "generate RUN --prompt a --repetition-penalty 1e300": ["repetition_penalty must be a finite"],
    "generate RUN --prompt a --num-beams 0": ["num_beams must be an integer >= 1, got 0"],
    "generate RUN --prompt a --num-beams 2 --top-k 5": ["leave out top_k=5"],
    "generate RUN --prompt a --num-beams 2 --temperature 0.5": [
        "leave out temperature=0.5",
        "take --num-beams=1",
    ],
    "generate RUN --prompt a --num-beams 2 --top-p 0.5": ["leave out top_p=0.5"],
    "generate RUN --prompt a --num-beams 2 --min-p 0.1": ["leave out min_p=0.1"],
    "prepare --data empty --out out": ["empty has only empty files, such as a.txt"],
    "train --data empty --out out": ["empty has only empty files, such as a.txt"],
    "generate RUN --prompt a --length-penalty nan": ["length_penalty must be a finite number"],
    "generate RUN --prompt a --stop=": ["stop has an empty string"],
    "info now": ["now"],
}


@pytest.mark.parametrize("command", BAD_COMMANDS)
def test_bad_input(command: str, trained: Path, text: Path, capsys: Capture) -> None:
    Path("text.txt").write_bytes(text.read_bytes())
    Path("resume.toml").write_text("resume = true")
    Path("empty").mkdir()
    Path("empty/a.txt").touch()
    jsonl(Path("bad.jsonl"), {"text": "a"}, {"body": "b"})
    jsonl(Path("mixed.jsonl"), {"text": "a"}, {"prompt": "b", "completion": "c"})
    if "tokens " in command:
        done(capsys, "prepare", "--data", "text.txt", "--out", "tokens", "--tokenizer", "byte")
    name, *args = command.replace("RUN", str(trained)).split()
    if name == "prepare" and "--tokenizer" not in args:
        args += ["--tokenizer", "byte"]
    if name in ("train", "search"):
        sizes = TINY if "--tokenizer=" not in args else TINY[2:]
        args = [*sizes, "--data", "text.txt", *args]
    before = Path("text.txt").read_bytes()
    refused(run(capsys, name, *args), *BAD_COMMANDS[command])
    assert Path("text.txt").read_bytes() == before
    assert not list(Path().glob("out/checkpoints")) and not list(Path().glob("out/*.bin"))


@pytest.mark.parametrize(
    "args",
    [
        ["generate", "RUN", "--prompt", "caf\udce9"],
        ["generate", "RUN", "--prompt", "a", "--stop", "\udce9"],
        ["train", "--out", "caf\udce9"],
        ["train", "--data", "caf\udce9", "--out", "out"],
    ],
    ids=["prompt", "stop", "out", "data"],
)
def test_arguments_that_are_not_utf8(args: list[str], trained: Path, capsys: Capture) -> None:
    """Python passes on a byte that is not UTF-8 as a lone surrogate."""
    args = [str(trained) if arg == "RUN" else arg for arg in args]
    refused(run(capsys, *args), "an argument is not UTF-8 text", r"\udce9")
    assert list(Path().iterdir()) == []


def test_utf8_under_a_locale_of_ascii(trained: Path, capsys: Capture) -> None:
    """Python hands on the bytes of UTF-8 as lone surrogates if the locale knows ASCII alone."""
    texts = []
    for prompt in ("café 漢", "café 漢".encode().decode("ascii", "surrogateescape")):
        args = ["generate", str(trained), "--prompt", prompt, "--seed", "1"]
        code, out, _ = run(capsys, *args, "--max-new-tokens", "3")
        assert code == 0
        texts.append(out)
    assert texts[0] == texts[1] and "café 漢" in texts[0]


PROMPTS = st.text(max_size=12) | st.lists(
    st.sampled_from(["<|endoftext|>", "<|", "|>", "a", " ", "\0", "\n", "é", "\udcff", "𝕏"]),
    max_size=6,
).map("".join)
NUMBERS = st.sampled_from(["0", "1", "2", "-1", "0.5", "nan", "inf", "1e300", "1e-300", "x", ""])
FLAGS = st.sampled_from(
    [
        "--temperature",
        "--top-k",
        "--top-p",
        "--min-p",
        "--repetition-penalty",
        "--num-beams",
        "--length-penalty",
        "--seed",
        "--max-new-tokens",
    ]
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    prompt=PROMPTS,
    flags=st.lists(st.tuples(FLAGS, NUMBERS), max_size=4),
    stops=st.lists(PROMPTS, max_size=2),
    special=st.lists(st.sampled_from(["<|endoftext|>", "all", ""]), max_size=1),
    logprobs=st.booleans(),
)
def test_any_generation_works_or_is_refused(
    prompt: str,
    flags: list[tuple[str, str]],
    stops: list[str],
    special: list[str],
    logprobs: bool,
    trained: Path,
    capsys: Capture,
) -> None:
    args = [f"{flag}={value}" for flag, value in [("--max-new-tokens", "3"), *flags]]
    args += [f"--stop={stop}" for stop in stops] + [f"--allow-special={name}" for name in special]
    args += ["--logprobs"] * logprobs
    result = run(capsys, "generate", trained, f"--prompt={prompt}", *args)
    if result[0]:
        refused(result)
        assert result[1] == ""
    else:
        assert SEED_LINE.sub("", result[2]) == ""
        assert logprobs or result[1].startswith(prompt)


def test_eval_of_a_missing_part(tmp_path: Path, capsys: Capture) -> None:
    random_model(vocab_size=257).save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("some words " * 40)
    options = ["--data", tmp_path / "a.txt", "--tokenizer", "byte", "--out", tmp_path / "tokens"]
    done(capsys, "prepare", *options, "--split", 1.0)
    measured = ["eval", tmp_path / "model", "--data", tmp_path / "tokens", "--tokenizer", "byte"]
    refused(run(capsys, *measured), "tokens has no part val, only train")
    assert "perplexity" in done(capsys, *measured, "--part", "train")
