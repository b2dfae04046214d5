"""Test search: specs, trials in subprocesses (a script replaces training), tables, range tests."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from seeds import numpy_generator

from gptfast import cli
from gptfast.search.plot import plot_search
from gptfast.search.range_test import lr_range, range_test, smooth
from gptfast.search.report import run_search
from gptfast.search.space import log_fields, parse_grid, parse_random
from gptfast.search.trials import Result, load_result

# This script does what a search sees of `gptfast train --config FILE --resume`. Its losses are
# lowest at lr = 1e-3; the setting `act` decides how it ends, and `starts` counts its starts.
FAKE = r"""
import glob, json, math, os, signal, sys, time, tomllib
config = tomllib.load(open(sys.argv[sys.argv.index("--config") + 1], "rb"))
out, act, lr = config["out"], config.get("act", "finish"), config["lr"]
steps = config.get("max_steps", 4)
steps = 4 if steps == "none" else steps
assert "--resume" in sys.argv
with open(out + "/starts", "a") as file:
    file.write(f"{time.time()} {os.environ.get('OMP_NUM_THREADS')}\n")
print("hello from stdout")
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
if act == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
path = out + "/metrics.jsonl"
done = len(open(path).readlines()) if os.path.exists(path) else 0
if act == "silent":
    sys.exit(3)
again = len(open(out + "/starts").readlines()) > 1
for step in range(done, steps + 1):
    loss = 3 + abs(math.log10(lr) + 3) + 4 * math.exp(-step)
    if "rising" in config:
        loss = 4 + config["rising"] * step
    row = {"step": step, "tokens": 64 * step, "epoch": step / 10, "lr": lr, "loss": loss}
    row |= {"val_loss": loss, "train_loss": loss - 0.5, "tokens_per_second": 1000.0 + step}
    if config.get("schedule") == "exponential":
        row["lr"] = config["min_lr"] * (lr / config["min_lr"]) ** (step / steps)
        x = math.log10(row["lr"])
        row["loss"] = 7 - 3 / (1 + math.exp(-4 * (x + 3))) + math.exp(6 * (x + 1))
        if row["loss"] > 20:
            sys.exit("gptfast: loss is nan at step %d" % step)
    if step == steps:
        row["final"] = True
    if step == 2 and act == "crash":
        print("gptfast: loss is inf | at step 2", file=sys.stderr)
        print("goodbye from stdout")
        sys.exit(1)
    if step == 2 and act == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if step == 2 and act == "leave" and not again:
        sys.exit(0)
    while step == 2 and act in ("hang", "stubborn") and not again and (act != "hang" or not stop):
        open(out + "/hangs", "w").close()
        time.sleep(0.02)
    if stop:
        sys.exit(0)
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
if "company" in config:
    # Ends only when so many trials have begun, which a lone one would wait for in vain.
    while len(glob.glob(out + "/../*/starts")) < config["company"]:
        time.sleep(0.02)
    with open(out + "/ends", "w") as file:
        file.write(str(time.time()))
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    return [sys.executable, str(script)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def starts(out: Path) -> dict[str, int]:
    return {
        path.parent.name: len(path.read_text().splitlines()) for path in out.glob("trial-*/starts")
    }


BASE = {"max_steps": 4, "data": ["a b.txt"], "min_lr": None, "tokenizer": 'odd "name" \\ é'}
LRS = [{"lr": 1e-2}, {"lr": 1e-3}, {"lr": 1e-5}]


def test_grid_is_the_product() -> None:
    grid = parse_grid(["lr=1e-4,0.5", "n-layer=2,4", 'schedule=cosine,"wsd"', "compile=true,false"])
    assert len(grid) == 16
    assert grid[0] == {"lr": 1e-4, "n_layer": 2, "schedule": "cosine", "compile": True}
    assert grid[1] == {**grid[0], "compile": False}
    assert grid[-1] == {"lr": 0.5, "n_layer": 4, "schedule": "wsd", "compile": False}
    assert [type(value) for value in grid[0].values()] == [float, int, str, bool]
    assert parse_grid(["max_norm=inf"]) == [{"max_norm": math.inf}]


BAD_GRIDS = [
    ([], "no field to vary"),
    (["lr"], "'lr' is not of the form NAME=VALUES"),
    (["=1,2"], "is not of the form"),
    (["lr="], "is not of the form"),
    (["lr=1,,2"], "lr=1,,2 has an empty value"),
    (["lr=1,1.0"], "lr=1,1.0 lists 1.0 twice"),
    (["lr=nan"], "lr=nan: no setting can be nan"),
    (['tokenizer="gpt2'], "close its quotes"),
    (["lr=1", "lr=2"], "lr is given twice"),
    (["n_head=1", "n-head=2"], "n_head is given twice"),
    (["n_layers=1"], r"there is no field 'n_layers'; did you mean n_layer\?"),
    (["zzz=1"], "there is no field 'zzz'$"),
]


@pytest.mark.parametrize(("specs", "message"), BAD_GRIDS, ids=lambda x: str(x)[:30])
def test_bad_grids(specs: list[str], message: str) -> None:
    allowed = ["lr", "n_layer", "n_head", "tokenizer"]
    with pytest.raises(ValueError, match=message):
        parse_grid(specs, allowed=allowed)
    if "no field '" not in message:
        with pytest.raises(ValueError, match=message):
            parse_random(specs, 1, allowed=allowed)


SPACE = ["lr=1e-4:1e-2:log", "dropout=0:0.3", "batch_size=4:16", "n_embd=8:512:log", "act=x,y"]


def test_random_draws_are_in_their_ranges() -> None:
    drawn = parse_random(SPACE, 400, seed=3)
    columns = {name: [trial[name] for trial in drawn] for name in drawn[0]}
    for name, low, high in (("lr", 1e-4, 1e-2), ("dropout", 0, 0.3)):
        assert all(isinstance(x, float) and low <= x <= high for x in columns[name])
    assert set(columns["batch_size"]) == set(range(4, 17))
    assert all(isinstance(x, int) and 8 <= x <= 512 for x in columns["n_embd"])
    assert set(columns["act"]) == {"x", "y"}
    # Half of the draws lie below the middle of a range, the geometric middle if it is logarithmic;
    # 400 fair coins are within 4 standard deviations, 40, of half.
    for name, middle in (("lr", 1e-3), ("dropout", 0.15), ("n_embd", 64)):
        assert abs(sum(x < middle for x in columns[name]) - 200) < 40
    assert all(abs(n - 400 / 13) < 4 * 5.5 for n in Counter(columns["batch_size"]).values())


def test_random_is_fixed_by_its_seed() -> None:
    assert parse_random(SPACE, 20, seed=1)[:5] == parse_random(SPACE, 5, seed=1)
    assert parse_random(SPACE, 5, seed=1) != parse_random(SPACE, 5, seed=2)
    # The draws are written here, so that later versions can continue a search of today.
    first_two = [{"lr": 0.004885, "n": 7}, {"lr": 0.0006937, "n": 3}]
    assert parse_random(["lr=1e-4:1e-2:log", "n=1:9"], 2, seed=0) == first_two


def test_random_settings_differ() -> None:
    drawn = parse_random(["n_layer=1:4", "compile=true,false"], 8)
    assert len({tuple(trial.values()) for trial in drawn}) == 8
    with pytest.raises(ValueError, match="found only 8 different settings, not 9"):
        parse_random(["n_layer=1:4", "compile=true,false"], 9)


BAD_RANGES = [
    (["lr=1:1"], "lr=1:1 is an empty range: 1 is not below 1"),
    (["lr=2:1"], "is an empty range"),
    (["lr=0:1:log"], "a logarithmic range must start above 0, got 0"),
    (["lr=1:2:3"], "is not of the form lr=LOW:HIGH or lr=LOW:HIGH:log"),
    (["lr=a:2"], "a range goes from one number to another, got 'a'"),
    (["lr=1:inf"], "a range goes from one number to another, got inf"),
    (["lr=1:"], "a range goes from one number to another, got ''"),
]


@pytest.mark.parametrize(("specs", "message"), BAD_RANGES, ids=lambda x: str(x)[:30])
def test_bad_ranges(specs: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_random(specs, 3)


def test_trials_must_be_positive() -> None:
    with pytest.raises(ValueError, match="trials must be an integer >= 1, got 0"):
        parse_random(["lr=1:2"], 0)


def test_log_fields_are_those_drawn_logarithmically() -> None:
    assert log_fields(SPACE) == ["lr", "n_embd"]
    assert log_fields([]) == []


def test_search_sorts_and_writes(
    out: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    results = run_search(BASE, LRS, out, command=command)
    assert [result.settings["lr"] for result in results] == [1e-3, 1e-2, 1e-5]
    best = results[0]
    assert (best.trial, best.status, best.reason) == ("trial-002", "done", None)
    assert best.val_loss == best.last_val_loss == 3 + 4 * math.exp(-4)
    assert (best.best_step, best.tokens_per_second) == (4, 1002.0)
    assert best.train_loss == best.val_loss - 0.5
    assert 0 < best.seconds < 20
    config = tomllib.loads((out / "trial-002/trial.toml").read_text("utf-8"))
    where = {"lr": 1e-3, "out": str(out / "trial-002"), "min_lr": "none"}
    assert config == {**BASE, **where}
    assert (out / "trial-002/log.txt").read_text() == "hello from stdout\n"
    saved = json.loads((out / "results.json").read_text())
    assert [row["trial"] for row in saved] == ["trial-002", "trial-001", "trial-003"]
    assert saved[0]["val_loss"] == best.val_loss
    assert (out / "best").readlink() == Path("trial-002")
    table = (out / "results.md").read_text().splitlines()
    assert table[0].startswith("| trial | lr | best val loss | at step |")
    assert table[2].startswith("| trial-002 | 0.001 | 3.0733 | 4 | 3.0733 | 2.5733 | 1,002 |")
    assert len(table) == 5 and len({line.count("|") for line in table}) == 1
    printed = capsys.readouterr().out
    assert "trial-001 starts: lr=0.01" in printed
    assert "best: lr=0.001" in printed
    lines = printed.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("trial "))
    at = lines[head].index("best val loss") + len("best val loss")
    assert [line[at - 6 : at] for line in lines[head + 1 : head + 4]] == [
        "3.0733",
        "4.0733",
        "5.0733",
    ]


def test_picture_shows_the_trials(
    out: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    figures, real = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: figures.append(self) or real(self, *a, **k)
    )
    trials = [{"lr": lr, "n_layer": n, "act": "finish"} for lr in (1e-3, 1e-2) for n in (2, 4)]
    trials[3]["act"] = "crash"
    run_search(BASE, trials, out, command=command, log_fields=["lr"])
    losses, lr, n_layer = figures[0].axes
    labels = [line.get_label() for line in losses.lines]
    assert labels[0] == "lr=0.001 n_layer=2 act=finish"
    assert labels[3] == "lr=0.01 n_layer=4 act=crash (failed)"
    expected = [[64 * step, 3 + 4 * math.exp(-step)] for step in range(5)]
    assert np.allclose(losses.lines[0].get_xydata(), expected)
    assert (lr.get_xlabel(), lr.get_xscale()) == ("lr", "log")
    assert (n_layer.get_xlabel(), n_layer.get_xscale()) == ("n_layer", "linear")
    best = 3 + 4 * math.exp(-4)
    assert np.allclose(lr.collections[0].get_offsets(), [[1e-3, best]] * 2 + [[1e-2, best + 1]])
    assert np.allclose(n_layer.collections[0].get_offsets()[:, 0], [2, 4, 2])
    assert min(matplotlib.image.imread(out / "search.png").shape[:2]) > 400


def test_a_search_with_many_trials_is_readable(tmp_path: Path) -> None:
    """Every trial has its own colour, and the legend does not cover the curves."""
    rates = np.geomspace(1e-4, 1e-2, 20)
    results = [
        Result(f"trial-{i:03d}", {"lr": lr}, "done", 4 + i / 20, 2, 5.0, 4.0, 9.0, 1.0, None)
        for i, lr in enumerate(rates)
    ]
    histories = [
        [{"tokens": t, "val_loss": 9 / (t + 1) + r.val_loss} for t in range(5)] for r in results
    ]
    figures = []
    real = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Figure, "savefig", lambda self, *a, **k: figures.append(self) or real(self, *a, **k)
        )
        plot_search(results, histories, tmp_path / "search.png")
    losses, by_rate = figures[0].axes
    assert len({line.get_color() for line in losses.lines}) == 20
    renderer = figures[0].canvas.get_renderer()
    legend = losses.get_legend().get_window_extent(renderer)
    assert legend.x0 >= 0 and legend.y0 >= 0
    assert legend.x1 < losses.get_window_extent(renderer).x0
    assert legend.height < figures[0].bbox.height
    assert by_rate.get_xscale() == "log"  # a hundredfold range


def test_failures_come_last_with_their_reasons(out: Path, command: list[str]) -> None:
    acts = ["crash", "die", "silent", "finish"]
    results = run_search({**BASE, "lr": 1e-3}, [{"act": act} for act in acts], out, command=command)
    assert results[0].settings == {"act": "finish"}
    reasons = {result.settings["act"]: result.reason for result in results[1:]}
    assert reasons == {
        "crash": "loss is inf | at step 2",
        "die": "killed by signal 9 (Killed)",
        "silent": "hello from stdout",
    }
    assert all(result.status == "failed" for result in results[1:])
    crash = next(result for result in results if result.settings["act"] == "crash")
    assert (crash.best_step, crash.val_loss) == (1, 3 + 4 * math.exp(-1))
    table = (out / "results.md").read_text()
    assert r"failed: loss is inf \| at step 2 |" in table
    assert "| - | - | - | - | - |" in table  # the trial without output has no numbers


def test_the_untrained_model_does_not_count(out: Path, command: list[str]) -> None:
    """If training makes the initial model worse, a trial's best loss still comes from training."""
    best = run_search({**BASE, "rising": 1.0}, LRS[:1], out, command=command)[0]
    assert (best.best_step, best.val_loss) == (1, 5.0)


def test_all_failed(out: Path, command: list[str]) -> None:
    trials = [{"lr": 1.0}, {"lr": 2.0}]
    with pytest.raises(
        RuntimeError, match=r"all 2 trials failed, trial-001: loss is inf .*log.txt"
    ):
        run_search({**BASE, "act": "crash"}, trials, out, command=command)
    assert starts(out) == {"trial-001": 1, "trial-002": 1}
    assert not (out / "results.md").exists()


def test_a_search_continues_with_unfinished_trials(
    out: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    base = {**BASE, "lr": 1e-3}
    trials = [{"act": "finish"}, {"act": "crash"}, {"act": "leave"}]
    first = run_search(base, trials, out, command=command)
    assert [r.status for r in first] == ["done", "interrupted", "failed"]
    assert first[1].reason == "stopped before its last step"
    capsys.readouterr()
    second = run_search(base, trials, out, command=command)
    assert {r.settings["act"]: r.status for r in second} == {
        "finish": "done",
        "leave": "done",
        "crash": "failed",
    }
    assert starts(out) == {"trial-001": 1, "trial-002": 2, "trial-003": 2}
    assert "1 of 3 trials are done already" in capsys.readouterr().out
    # The trial started twice and kept its old rows: the fake continues after them.
    rows = (out / "trial-003/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert (out / "trial-003/log.txt").read_text().count("hello") == 2


def test_more_trials_may_follow(out: Path, command: list[str]) -> None:
    run_search(BASE, LRS[:2], out, command=command)
    assert len(run_search(BASE, LRS, out, command=command)) == 3
    assert starts(out) == {"trial-001": 1, "trial-002": 1, "trial-003": 1}


def test_another_search_is_refused(out: Path, command: list[str]) -> None:
    run_search(BASE, LRS[:2], out, command=command)
    before = (out / "search.json").read_text()
    with pytest.raises(ValueError, match="holds another search, with another max_steps, tokenizer"):
        run_search({**BASE, "max_steps": 5, "tokenizer": "byte"}, LRS[:2], out, command=command)
    for trials in (LRS[:1], LRS[1:], LRS[::-1]):
        with pytest.raises(ValueError, match="holds another search, of other trials; choose"):
            run_search(BASE, trials, out, command=command)
    assert (out / "search.json").read_text() == before
    (out / "search.json").write_text(before[:20])
    with pytest.raises(ValueError, match="search.json is damaged"):
        run_search(BASE, LRS[:2], out, command=command)


def test_a_search_that_runs_is_left_alone(out: Path, command: list[str]) -> None:
    refused = []

    def again() -> None:
        with pytest.raises(ValueError, match="is in use by another process") as error:
            run_search(BASE, LRS, out, command=command)
        refused.append(error)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = when_hanging(out, 1, again)
    with pytest.raises(KeyboardInterrupt):
        run_search(BASE, [{"lr": 1e-3, "act": "hang"}], out, command=command)
    thread.join()
    assert refused and starts(out) == {"trial-001": 1}


def test_steps_and_epochs_replace_each_other(out: Path, command: list[str]) -> None:
    run_search({**BASE, "lr": 1e-3, "epochs": None}, [{"epochs": 2}], out, command=command)
    config = tomllib.loads((out / "trial-001/trial.toml").read_text("utf-8"))
    assert (config["epochs"], config["max_steps"]) == (2, "none")


@pytest.mark.parametrize("jobs", [0, -1])
def test_jobs_must_be_positive(jobs: int, out: Path) -> None:
    with pytest.raises(ValueError, match=f"jobs must be an integer >= 1, got {jobs}"):
        run_search(BASE, LRS, out, jobs=jobs)


def test_no_trials(out: Path) -> None:
    with pytest.raises(ValueError, match="at least one trial"):
        run_search(BASE, [], out)
    assert not out.exists()


def test_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to"):
        run_search(BASE, LRS, tmp_path / "file" / "out")


def test_jobs_run_side_by_side(
    out: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    trials = [{"lr": 10.0**-i, "company": min(i + i % 2, 4)} for i in range(1, 5)]
    run_search(BASE, trials, out, jobs=2, command=command)
    names = [f"trial-{i:03d}" for i in range(1, 5)]
    began = [float((out / name / "starts").read_text().split()[0]) for name in names]
    ended = [float((out / name / "ends").read_text()) for name in names]
    # The first two can end only if both run. Of the others, one begins when one of them has ended,
    # and the last when another has ended.
    assert sorted(began)[2] >= sorted(ended)[0] and sorted(began)[3] >= sorted(ended)[1]
    threads = {path.read_text().split()[1] for path in out.glob("trial-*/starts")}
    assert threads == {str(max(1, len(os.sched_getaffinity(0)) // 2))}


def when_hanging(out: Path, n: int, act: Callable[[], Any]) -> threading.Thread:
    """Call `act` from another thread as soon as n trials hang."""

    def wait() -> None:
        end = time.time() + 20
        while len(list(out.glob("trial-*/hangs"))) < n and time.time() < end:
            time.sleep(0.02)
        try:
            act()
        except BaseException:  # otherwise the search would hang with its trials
            os.kill(os.getpid(), signal.SIGTERM)
            raise

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def children() -> list[str]:
    found = subprocess.run(
        ["ps", "-o", "args=", "--ppid", str(os.getpid())], capture_output=True, encoding="utf-8"
    )
    return [line for line in found.stdout.splitlines() if "fake.py" in line]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_interruption_waits_and_goes_on_later(
    number: int, out: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    trials = [{"lr": 10.0**-i, "act": "hang"} for i in range(1, 5)]
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    thread = when_hanging(out, 2, lambda: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt, match=signal.Signals(number).name) as raised:
        run_search(BASE, trials, out, jobs=2, command=command)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptfast.cli.parse", Mock(side_effect=raised.value))
        assert cli.main(["search"]) == 128 + number
    thread.join()
    assert children() == []
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert "stopped; the same command continues" in capsys.readouterr().out
    assert not (out / "results.md").exists()
    assert starts(out) == {"trial-001": 1, "trial-002": 1}
    for name in starts(out):
        # The trial exited with code 0 but is not done.
        result = load_result(out / name)
        assert (result.status, result.reason) == ("interrupted", "stopped before its last step")
        assert len((out / name / "metrics.jsonl").read_text().splitlines()) == 2
    for name in ("trial-003", "trial-004"):
        (out / name).mkdir()
        (out / name / "starts").write_text("so that they do not hang\n")
    results = run_search(BASE, trials, out, jobs=2, command=command)
    assert [result.status for result in results] == ["done"] * 4
    assert starts(out) == {f"trial-00{i}": 2 for i in range(1, 5)}


def test_a_second_ctrl_c_kills(out: Path, command: list[str]) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    thread = when_hanging(out, 1, twice)
    with pytest.raises(KeyboardInterrupt):
        run_search(BASE, [{"lr": 1e-3, "act": "stubborn"}], out, command=command)
    thread.join()
    assert children() == []


def curve(lr: np.ndarray, *, steepest: float, diverges: float) -> np.ndarray:
    """Return losses that fall from 10 to 4, most steeply at one rate, and rise after another."""
    x = np.log10(lr)
    return (
        10
        - 6 / (1 + np.exp(-4 * (x - math.log10(steepest))))
        + np.minimum(np.exp(8 * (x - math.log10(diverges))), 100)
    )


@pytest.mark.parametrize("n", [40, 100, 400])
@pytest.mark.parametrize("steepest", [1e-4, 1e-3])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_suggestion_is_where_the_loss_falls(n: int, steepest: float, noise: float) -> None:
    lr = np.geomspace(1e-6, 1, n)
    loss = curve(lr, steepest=steepest, diverges=0.03)
    loss += noise * numpy_generator(n).standard_normal(n)
    test = range_test(lr.tolist(), loss.tolist())
    # The average lags by a twentieth of the points, 0.3 of these six decades.
    assert steepest / 2 < test.suggestion < 4 * steepest
    lowest = lr[np.argmin(curve(lr, steepest=steepest, diverges=0.03))]
    assert lowest / 3 < 10 * test.tenth_of_minimum < 3 * lowest
    assert test.suggestion < 10 * test.tenth_of_minimum
    # The kept part ends soon after the loss passes 1.25 times the first one, at lr 0.04.
    assert 0.03 < test.lr[-1] < 0.2
    assert len(test.lr) == len(test.loss) == len(test.smoothed)
    assert test.loss == loss[: len(test.loss)].tolist()


def test_smoothing_is_a_corrected_moving_average() -> None:
    assert np.allclose(smooth([5.0] * 50), 5.0)
    values = numpy_generator(0).standard_normal(100)
    weights = 0.8 ** np.arange(100)
    expected = [
        weights[: i + 1][::-1] @ values[: i + 1] / weights[: i + 1].sum() for i in range(100)
    ]
    assert np.allclose(smooth(values.tolist()), expected)


def test_range_tests_that_say_nothing() -> None:
    lr = np.geomspace(1e-5, 1, 50).tolist()
    with pytest.raises(ValueError, match="of 9 steps .* raise max_steps"):
        range_test(lr[:9], [1.0] * 9)
    with pytest.raises(ValueError, match="diverged after [4-9] steps.*raise max_steps"):
        range_test(lr, [5.0, 4.9, 4.8] + [4.0 + i for i in range(47)])
    with pytest.raises(ValueError, match="the loss only rose from 1e-05 on; .*raise max_steps"):
        range_test(lr, [5 + 0.01 * i for i in range(50)])


def test_lr_range_suggests_and_draws(
    out: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    base = {**BASE, "max_steps": 100, "lr": 5.0, "early_stopping": 2, "schedule": "wsd"}
    test = lr_range(base, 1e-5, 1.0, out, command=command)
    assert 5e-4 < test.suggestion < 4e-3
    config = tomllib.loads((out / "trial-001/trial.toml").read_text())
    wanted = {"schedule": "exponential", "lr": 1.0, "min_lr": 1e-5, "warmup_steps": 0}
    wanted |= {"log_interval": 1, "early_stopping": "none", "max_steps": 100}
    assert {name: config[name] for name in wanted} == wanted
    # The run diverged, but the losses from before still count.
    assert load_result(out / "trial-001").status == "failed"
    assert 0.05 < test.lr[-1] < 0.5
    printed = capsys.readouterr().out
    assert f"suggested: {test.suggestion:.2g}" in printed
    table = printed[printed.index("smoothed loss") :].splitlines()[1:16]
    assert [float(line.split()[0]) for line in table] == sorted(
        float(f"{test.lr[i]:.2e}") for i in np.linspace(0, len(test.lr) - 1, 15).round().astype(int)
    )
    pixels = matplotlib.image.imread(out / "lr_range.png")[..., :3]
    assert (np.ptp(pixels, axis=-1) > 0.3).sum() > 500


def test_lr_range_takes_its_own_number_of_steps(out: Path, command: list[str]) -> None:
    lr_range({"data": []}, 1e-5, 1e-2, out, command=command)
    assert tomllib.loads((out / "trial-001/trial.toml").read_text())["max_steps"] == 200


def test_lr_range_refuses(out: Path, command: list[str]) -> None:
    for low, high in ((0, 1), (1e-2, 1e-3), (1e-3, math.inf), (-1, 1)):
        with pytest.raises(ValueError, match="the rates must be 0 < LOW < HIGH"):
            lr_range(BASE, low, high, out, command=command)
    with pytest.raises(ValueError, match="raise max_steps"):
        lr_range(BASE, 1e-5, 1e-2, out / "short", command=command)
    with pytest.raises(RuntimeError, match="hello from stdout .*log.txt"):
        lr_range({**BASE, "act": "silent"}, 1e-5, 1e-2, out / "silent", command=command)
    with pytest.raises(RuntimeError, match="stopped before its last step .*log.txt"):
        lr_range({**BASE, "act": "leave"}, 1e-5, 1e-2, out / "left", command=command)
