"""bench/gpu.py runs on the CPU with --smoke, so that CI, which has no GPU, covers its code.

stub_jobs.py runs what the smoke run leaves out, up to the launches.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gpu
import gpu_cache
import gpu_device
import gpu_timing
import pytest
import torch
from gpu_cases import Built, GpuCase
from gpu_jobs import Job, Outcome, slug
from test_launch import printed

BENCH = Path(__file__).parent.parent / "bench"


def run(out: Path, *options: str) -> tuple[int, dict, str]:
    """Return the exit status of bench/gpu.py, what it wrote as data, and its page."""
    command = [sys.executable, str(BENCH / "gpu.py"), "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    paths = list(out.glob("*/all.json"))
    assert len(paths) == 1, done.stdout + done.stderr
    page = paths[0].with_suffix(".md").read_text()
    return done.returncode, json.loads(paths[0].read_text()), page


def test_smoke_run(tmp_path: Path) -> None:
    """Every section's code runs, and its results reach both files."""
    status, data, page = run(tmp_path, "--smoke")
    jobs = data["jobs"]
    assert status == 0, {name: job["status"] for name, job in jobs.items()}
    sections = {job["section"] for job in jobs.values()}
    assert sections == {
        "machine", "limits", "bench", "parity", "step", "profile", "determinism", "sanitize", "ncu",
    }  # fmt: skip
    assert all(job["result"] for job in jobs.values())
    assert {"torch", "triton", "python", "gpu", "date"} <= set(data["machine"])
    rows = [job["result"] for job in jobs.values() if job["section"] == "bench"]
    assert len(rows) > 8
    for row in rows:
        assert row["wall_seconds"]["gptfast"] > 0 and not row["failed"]
        assert sum(line.startswith(f"| {row['case']} |") for line in page.splitlines()) == 1
    assert jobs["parity"]["result"]["tests"] == 1
    assert (tmp_path / "parity.xml").exists()
    assert (tmp_path / "jobs" / jobs["profile eager"]["result"]["table"]).exists()


@pytest.mark.parametrize("mode", [(), ("--smoke",)], ids=["fresh", "forked"])
def test_jobs_that_end_badly_take_nothing_along(tmp_path: Path, mode: tuple[str, ...]) -> None:
    status, data, page = run(tmp_path, "--only", "faults", *mode)
    jobs = data["jobs"]
    assert status == 1
    assert {name: job["status"] for name, job in jobs.items()} == {
        "crash": "ended by SIGSEGV",
        "hang": "not finished after 1 s",
        "fail": "ValueError: on purpose",
        "work": "done",
    }
    assert jobs["crash"]["result"] == "before the crash"
    assert jobs["fail"]["result"] == "before the error"
    assert jobs["work"]["result"] == "after the others"
    assert all(job["status"] in page for job in jobs.values())
    # What the hanging job had started has ended with it.
    child = Path(f"/proc/{jobs['hang']['result']}/stat")
    assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"


def names(tmp_path: Path, call: str, only: str | None = None, cases: str = "") -> list[str]:
    args = Namespace(call=call, only=only, cases=re.compile(cases))
    return [job.name for job in gpu._chosen(args, tmp_path)]


def test_each_call_has_its_jobs(tmp_path: Path) -> None:
    calls = {call: names(tmp_path, call) for call in gpu.CALLS}
    assert all(found[:2] == ["machine", "limits"] for found in calls.values())
    everything = names(tmp_path, "all")
    assert everything == ["machine", "limits", *(x for found in calls.values() for x in found[2:])]
    assert len({slug(name) for name in everything}) == len(everything)
    assert calls["kernels"][2].startswith("attention fwd")


# What a first contact with a GPU must answer, and the jobs of each call that do, in their order.
PLAN = {
    "kernels": [
        "attention fwd", "attention bwd", "linear_cross_entropy", "cross_entropy", "AdamW",
        "sample B=1", "parity", "norm and linear", "norm and mlp",
    ],
    "train": [
        "step eager", "step replayed", "GPT-2 124M step bf16 B=16", "profile eager", "determinism",
        "linear_cross_entropy with chunks of 64 MB", "linear_cross_entropy with chunks of 400 MB",
        "attention bwd bf16 causal (16, 12, 1024, 64), tiles of dK and dV", "step compiled",
        "profile compiled", "GPT-2 124M step bf16 B=16 T=1024, other forms",
    ],
    "rest": [
        "generate 128 tokens, GPT-2 124M bf16 B=1", "generate 128 tokens, GPT-2 124M int8 B=1",
        "generate 128 tokens, GPT-2 124M bf16 B=8", "memcheck attention", "memcheck adamw",
        "memcheck sample", "ncu attention_fwd_kernel", "ncu attention_bwd_dk_dv_kernel",
        "ncu sample", "ncu linear_cross_entropy_rows_kernel",
        "ncu linear_cross_entropy_dweight_kernel",
    ],
}  # fmt: skip


@pytest.mark.parametrize("call", gpu.CALLS)
def test_the_first_contact_is_answered(tmp_path: Path, call: str) -> None:
    found = iter(names(tmp_path, call))
    for wanted in PLAN[call]:
        assert any(name.startswith(wanted) for name in found), f"{wanted} is missing, or too early"


@pytest.mark.parametrize("call", gpu.CALLS)
def test_a_call_whose_jobs_take_all_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The limits of the jobs that start add up to less than nine minutes; the last ones wait."""
    seconds, limits, chosen = [1000.0], list[float](), list[str]()

    def take_it_all(job: Job, out: Path, limit: float, command: object) -> Outcome:
        limits.append(limit)
        chosen.append(job.name)
        seconds[0] += limit
        return Outcome("done", limit)

    monkeypatch.setattr(gpu, "run_job", take_it_all)
    monkeypatch.setattr(gpu, "unpack", lambda: None)
    monkeypatch.setattr(gpu, "time", Namespace(monotonic=lambda: seconds[0]))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--call", call, "--out", str(tmp_path)])
    assert gpu.main() == 1
    assert 480 < sum(limits) < 540
    everything = names(tmp_path, call)
    assert chosen == everything[: len(chosen)] and len(chosen) > 4
    (found,) = tmp_path.glob(f"*/{call}.json")
    left_out = [
        name
        for name, job in json.loads(found.read_text())["jobs"].items()
        if job["status"] == "left out: too little time is left"
    ]
    assert left_out == everything[len(chosen) :]


def test_nothing_is_timed_with_a_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default device makes every call of torch dearer: only data and checks are made with it."""

    def modes() -> int:
        return torch._C._len_torch_function_stack()

    seen: dict[str, set[int]] = {"build": set(), "run": set(), "check": set()}

    def build(smoke: bool) -> Built:
        seen["build"].add(modes())
        sides = {side: lambda: seen["run"].add(modes()) for side in ("gptfast", "other")}
        return Built(sides, lambda: seen["check"].add(modes()))

    monkeypatch.setattr(gpu_timing, "SMOKE", True)
    monkeypatch.setattr(gpu_timing, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_device, "DEVICE", "cpu")
    before, rows = modes(), list[dict]()
    gpu._device_job("case", "bench", partial(gpu_timing.measure, GpuCase("x", build), {}), 1).run(
        rows.append
    )
    assert seen == {"build": {before + 1}, "run": {before}, "check": {before + 1}}
    assert (
        rows[-1]["host_seconds"].keys() == rows[-1]["wall_seconds"].keys() == {"gptfast", "other"}
    )


def test_the_host_s_time_ends_where_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_timing, "synchronize", lambda: None)

    def run(queued: Callable[[], None]) -> None:
        queued()
        time.sleep(0.05)

    queueing, seconds = gpu_timing.wall_seconds(gpu_timing.Waiting(run))
    assert queueing < 0.05 <= seconds


def test_every_job_runs_to_its_launches() -> None:
    pytest.importorskip("triton")
    jobs = printed("stub_jobs.py")
    assert {name: job["ended"] for name, job in jobs.items()} == dict.fromkeys(jobs, "done")
    assert [name for name, job in jobs.items() if not job["kernels"]] == ["limits"]
    # The command's step replays the graph that it captured itself, after two ordinary steps.
    assert jobs["step replayed"]["captures"] == 1 and jobs["step replayed"]["replays"] == 3
    assert jobs["step replayed"]["result"]["replayed"]
    row = jobs["GPT-2 124M step bf16 B=16 T=1024"]
    assert row["captures"] == 1 and row["replays"] > 3
    for kind in ("seconds", "host_seconds", "wall_seconds"):
        assert set(row["result"][kind]) == {"gptfast", "gptfast, eager", "plain, compiled"}
    # Each tile of dK and dV is captured by itself, and has its own row.
    tiles = jobs["attention bwd bf16 causal (16, 12, 1024, 64), tiles of dK and dV"]
    assert tiles["captures"] == len(tiles["result"]["seconds"]) > 3


def test_jobs_are_chosen_by_section_and_name(tmp_path: Path) -> None:
    found = names(tmp_path, "all", "bench,ncu", "^sample B=1 |^ncu sample")
    assert found[2:] == ["sample B=1 V=50257 fp32, top_k 50, top_p 0.9", "ncu sample"]
    with pytest.raises(SystemExit, match="no section 'benhc'; choose from bench, "):
        names(tmp_path, "all", "benhc")


def test_a_cache_travels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(gpu_cache, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(gpu_cache, "ARCHIVE", tmp_path / "build" / "cache.tar.xz")
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    gpu_cache.unpack()  # there is nothing to unpack, and no harm done
    kernel = tmp_path / "cache" / "hash" / "kernel.cubin"
    kernel.parent.mkdir(parents=True)
    kernel.write_bytes(b"code")
    assert gpu_cache.pack() == gpu_cache.ARCHIVE.stat().st_size
    shutil.rmtree(tmp_path / "cache")
    gpu_cache.unpack()
    assert kernel.read_bytes() == b"code"
    shutil.rmtree(tmp_path / "cache")
    gpu_cache.ARCHIVE.write_bytes(b"damaged")
    gpu_cache.unpack()
    assert "kernels are compiled here" in capsys.readouterr().out
