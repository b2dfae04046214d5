"""Test how commands end in a shell: closed pipes, closed terminals, full disks, dry runs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest
import torch
from commands import TINY, Capture, done, run, start
from helpers import random_model

from gptfast.cli import main
from gptfast.cli.plan import Measured, _time_of
from gptfast.data.embedded import embedded_text
from gptfast.startup import is_command
from gptfast.training.interrupt import Interrupt
from gptfast.training.log import RunLog, say
from gptfast.weights.checkpoint import checkpoints, read_state

QUICK = "--sample-tokens 0 --eval-interval 1000 --eval-batches 1 --log-interval 5".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(embedded_text()[:3000], "utf-8")
    return path


def stream_without_reader() -> TextIO:
    """Return a pipe whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def train_args(text: Path, out: Path, steps: int) -> list[str]:
    where = ["--data", str(text), "--out", str(out), "--max-steps", str(steps)]
    return ["train", *TINY, *QUICK, *where]


def test_a_run_goes_on_without_its_reader(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`train | head` loses its log lines and nothing else, and says so once."""
    with stream_without_reader() as file:
        monkeypatch.setattr(sys, "stdout", file)
        assert main(train_args(text, tmp_path, 20)) == 0
    assert read_state(checkpoints(tmp_path)[-1])["step"] == 20
    err = capfd.readouterr().err
    assert err.count("cannot be written (Broken pipe)") == 1 and "Traceback" not in err


def test_losing_the_log_saves_at_once(text: Path, tmp_path: Path, capsys: Capture) -> None:
    """Who reads no more may kill the run next: the step is saved before anything else happens."""
    from gptfast.training.trainer import Trainer

    real, saved = Trainer.train_step, []

    def step(self: Trainer, batches: object) -> object:
        row = real(self, batches)  # type: ignore[arg-type]
        if self.progress.step == 7:
            self.log.lost = "Input/output error"
        saved.append([path.name for path in checkpoints(tmp_path)])
        return row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", step)
        code, _, err = run(capsys, *train_args(text, tmp_path, 9))
    assert code == 0
    assert saved[6] == [] and saved[7] == ["step-00000007"]
    assert err.startswith(
        "gptfast: the log lines cannot be written (Input/output error). Step 7 is"
    )
    assert err.count("\n") == 1


def test_head_and_a_full_disk(text: Path, tmp_path: Path) -> None:
    """In processes of their own: Python adds no complaint of its own when it ends."""
    args = [sys.executable, "-m", "gptfast"]
    train = subprocess.Popen(
        [*args, *train_args(text, tmp_path / "head", 30)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    assert "30 steps" in train.stdout.readline()
    train.stdout.close()
    err = train.stderr.read()
    assert train.wait(60) == 0
    assert err.count("\n") == 1 and "metrics.jsonl has its numbers" in err
    assert checkpoints(tmp_path / "head")[-1].name == "step-00000030"
    full = subprocess.run(
        [*args, "info"], stdout=open("/dev/full", "w"), stderr=subprocess.PIPE, encoding="utf-8"
    )
    assert (full.returncode, full.stderr) == (
        1,
        "gptfast: cannot write what is printed: No space left on device\n",
    )
    random_model(vocab_size=257).save_pretrained(tmp_path / "model")
    options = ["--tokenizer", "byte", "--prompt", "a", "--seed", "1", "--max-new-tokens", "4000"]
    generate = subprocess.Popen(
        [*args, "generate", str(tmp_path / "model"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert generate.stdout.read(1) == b"a"
    generate.stdout.close()
    assert generate.stderr.read() == b"" and generate.wait(60) == 141  # 128 + SIGPIPE


@pytest.fixture
def hangup() -> Iterator[None]:
    """Let SIGHUP do what it does by default, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangup")
def test_a_closed_terminal(text: Path, tmp_path: Path) -> None:
    """SIGHUP saves the step and ends the run as the signal does."""
    process = start(*train_args(text, tmp_path / "run", 10**6)[:-2], "--max-steps", 10**6)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.stdout.close()  # the terminal is gone, and with it what the run writes
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    state = read_state(checkpoints(tmp_path / "run")[-1])
    assert state["step"] > 0 and state["pending"] is None


@pytest.mark.usefixtures("hangup")
def test_nohup() -> None:
    """A SIGHUP that the shell ignores stays ignored; so do the handlers that were there."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupt.requested is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGHUP)
        assert interrupt.requested == "SIGHUP"
    assert signal.getsignal(signal.SIGHUP) is before


@pytest.mark.parametrize("kind", ["pipe", "closed", "full"])
def test_lines_that_cannot_be_written(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    if kind == "pipe":
        file = stream_without_reader()
    else:
        file = open("/dev/full" if kind == "full" else os.devnull, "w")
    if kind == "closed":
        file.close()
    monkeypatch.setattr(sys, "stdout", file)
    log = RunLog()
    log.line("a")
    assert log.lost
    say("b")
    monkeypatch.undo()
    assert capsys.readouterr().err.count("standard output cannot be written") == (kind == "closed")
    file.close()


def test_an_interrupted_text_ends_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    random_model(vocab_size=257).save_pretrained(tmp_path)

    def pieces(*_: object, **__: object) -> object:
        yield "bc"
        raise KeyboardInterrupt

    monkeypatch.setattr("gptfast.cli.generate.stream_text", pieces)
    args = ["generate", tmp_path, "--tokenizer", "byte", "-p", "a", "-s", 1]
    assert run(capsys, *args) == (130, "abc\n", "gptfast: interrupted\n")


@pytest.mark.parametrize("module", [True, False], ids=["module", "script"])
def test_ctrl_c_while_pytorch_is_imported(module: bool, tmp_path: Path) -> None:
    """Not only an import takes the signal: it comes inside one that turns it into another error."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException:\n    raise ImportError('no torch') from None\n"
    )
    script = tmp_path / "gptfast"
    script.write_text("import sys\nfrom gptfast.cli import main\nsys.exit(main())\n")
    root = str(Path(__file__).parents[1])
    result = subprocess.run(
        [sys.executable, *(["-m", "gptfast"] if module else [str(script)]), "info"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), root])},
        cwd=root if module else tmp_path,
        capture_output=True,
        encoding="utf-8",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (result.returncode, result.stderr) == (130, "gptfast: interrupted\n")


def test_a_thread_that_is_left_in_cpp(tmp_path: Path) -> None:
    """It comes back while Python ends, which would abort the process: the exit code stays."""
    (tmp_path / "gptfast").write_text(
        "import atexit, sys, threading, time\n"
        "from datetime import timedelta\n"
        "import gptfast.cli.info\n"
        "from torch.distributed import TCPStore\n"
        "class Late:\n"
        "    def __del__(self, sleep=time.sleep):\n"
        "        sleep(7)\n"
        "def run(self):\n"
        "    sys.late = Late()  # Python's own end takes longer than the thread\n"
        "    store = TCPStore('127.0.0.1', 0, None, True, timedelta(seconds=5))\n"
        "    threading.Thread(target=store.get, args=['x'], daemon=True).start()\n"
        "    atexit.register(print, 'cleaned up', end='')\n"
        "    raise RuntimeError('the link is cut')\n"
        "gptfast.cli.info.Info.run = run\n"
        "sys.exit(gptfast.cli.main())\n"
    )
    result = subprocess.run(
        [sys.executable, str(tmp_path / "gptfast"), "info"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
    )
    ended = result.returncode, result.stdout, result.stderr
    assert ended == (1, "cleaned up", "gptfast: the link is cut\n")


@pytest.mark.parametrize(
    ("words", "argv", "expected"),
    [
        (["python", "-m", "gptfast", "info"], ["-m", "info"], True),
        (["python", "-mgptfast", "info"], ["-m", "info"], True),
        (["python", "/bin/gptfast"], ["/bin/gptfast"], True),
        (["python", "-X", "dev", "/bin/gptfast", "train"], ["/bin/gptfast", "train"], True),
        (["python", "-m", "pytest", "gptfast"], ["-m", "gptfast"], False),
        (["python", "mine.py", "gptfast"], ["mine.py", "gptfast"], False),
        (["python", "-c", "import gptfast"], ["-c"], False),
        (["python"], [""], False),
        ([], [], False),
    ],
)
def test_what_is_the_command(words: list[str], argv: list[str], expected: bool) -> None:
    """Who imports gptfast keeps their own handling of Ctrl-C."""
    assert is_command(words, argv) == expected


@pytest.mark.parametrize("to", ["model", "model.bin", "model.pth", "packed"])
def test_a_model_for_which_there_is_no_room(to: str, tmp_path: Path) -> None:
    random_model(vocab_size=257).save_pretrained(tmp_path / "source")
    options = ["--dtype", "int8"] if to == "packed" else []
    args = ["convert", str(tmp_path / "source"), str(tmp_path / to), *options]
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "-", sys.executable, "-m", "gptfast", *args]
    result = subprocess.run(limited, capture_output=True, encoding="utf-8")
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"gptfast: cannot write {tmp_path / to}")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("jobs", [1, 2, 9])
def test_the_time_of_trials_side_by_side(jobs: int) -> None:
    assert _time_of([4, 2, 1, 1], jobs) == {1: 8, 2: 4, 9: 4}[jobs]


def test_a_dry_run_of_a_search_counts_its_jobs(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    measured = Measured(seconds=1.0, flops_per_second=1e6, memory=3 * 10**8)
    threads = torch.get_num_threads()
    monkeypatch.setattr("gptfast.cli.plan.measure", lambda trainer: measured)
    monkeypatch.setattr("gptfast.cli.plan.threads_of", lambda jobs: 1)
    args = ["search", *train_args(text, tmp_path / "run", 300)[1:], "--dry-run"]
    args += ["--grid", "lr=1e-3,2e-3,3e-3,4e-3"]
    try:
        alone = done(capsys, *args).splitlines()
        two = done(capsys, *args, "--jobs", 2).splitlines()
        many = done(capsys, *args, "--jobs", 90).splitlines()
    finally:
        torch.set_num_threads(threads)
    assert alone[:-3] == two[:-3] == many[:-3]
    assert alone[-3] == "memory: about 300 MB"
    assert two[-3] == "memory: about 600 MB, 2 at a time"
    assert many[-3] == "memory: about 1.2 GB, 4 at a time"
    assert two[-2] != alone[-2] and two[-2].endswith("for 4 trials, 2 at a time")
    assert many[-2].endswith("for 4 trials, 4 at a time")


def test_no_seed_where_nothing_is_drawn(tmp_path: Path, capsys: Capture) -> None:
    random_model(vocab_size=257).save_pretrained(tmp_path)
    args = ["generate", tmp_path, "--tokenizer", "byte", "-p", "a"]
    for options in (["-n", 0], ["--temperature", 0], ["--num-beams", 2, "-n", 2]):
        assert run(capsys, *args, *options)[2] == ""
    assert "--seed" in run(capsys, *args, "-n", 1)[2]


def test_a_dry_run_writes_nothing(text: Path, tmp_path: Path, capsys: Capture) -> None:
    args = train_args(text, tmp_path / "run", 300)
    out = done(capsys, *args, "--dry-run")
    for words in (
        "3,000 tokens",
        "300 steps",
        "model: 7,680 parameters: 1 block, 2 heads",
        "memory:",
        "disk:",
        "time: about",
    ):
        assert words in out
    assert out.endswith("dry run: nothing was written\n") and not (tmp_path / "run").exists()
    args = ["search", *args[1:], "--grid", "n_layer=1,2", "batch_size=2,4", "--dry-run"]
    out = done(capsys, *args)
    assert out.count(" parameters, 300 steps of ") == 4 and "for 4 trials" in out
    assert not (tmp_path / "run").exists()
    done(capsys, *train_args(text, tmp_path / "run", 1))
    code, _, err = run(capsys, *train_args(text, tmp_path / "run", 3), "--dry-run")
    assert code == 1 and "already holds a run" in err
    resumed = ["train", "--out", tmp_path / "run", "--resume", "--max-steps", 9, "--dry-run"]
    out = done(capsys, *resumed)
    assert "from step 1" in out and len(checkpoints(tmp_path / "run")) == 1
