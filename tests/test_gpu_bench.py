"""bench/gpu.py runs on the CPU with --smoke, so that CI, which has no GPU, covers its code."""

import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import gpu
import gpu_cache
import pytest
from gpu_jobs import slug

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
    assert calls["kernels"][2].startswith("attention fwd") and calls["kernels"][-1] == "parity"


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
