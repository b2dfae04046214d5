"""bench/gpu.py runs on the CPU with --smoke, so that CI, which has no GPU, covers its code."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parent.parent / "bench"


def test_smoke_run(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "gpu.py"), "--smoke", "--out", str(tmp_path)]
    command += ["--only", "bench"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("smoke-*.json")
    results = json.loads(path.read_text())
    rows = results["bench"]["rows"]
    assert len(rows) == 9 and all(row["seconds"]["gptfast"] > 0 for row in rows)
    lines = path.with_suffix(".md").read_text().splitlines()
    assert sum(line.startswith("| ") for line in lines) == 1 + len(rows)
