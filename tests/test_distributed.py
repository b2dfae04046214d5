"""Kill processes of a run at random moments: what is left is whole, and the run ends the same.

Also start runs as docs/distributed.md says.

It takes minutes, so it runs with `make test-distributed` only, which sets GPTFAST_TEST_DISTRIBUTED
to the number of kills.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import RUN, Ended, end, free_port, losses, start, train, write_data
from safetensors.torch import load_file
from seeds import python_generator

from gptfast.weights.checkpoint import checkpoints, read_state

KILLS = int(os.environ.get("GPTFAST_TEST_DISTRIBUTED", "0"))
pytestmark = pytest.mark.skipif(not KILLS, reason="takes minutes: make test-distributed")
# A save after each step, so that many kills fall into one. There the others wait for what a process
# writes to their store, not on a connection to it, so they know of its end by the time limit alone.
STEPS = ["--max-steps", "40", "--checkpoint-interval", "1", "--dist-timeout", "20"]


def kill_one(n: int, how: str, rank: int, delay: float, out: Path, data: Path) -> Ended:
    """Start n processes and kill one after a delay."""
    folder = out.with_name(f"{out.name}-streams")
    argv = [*RUN, "--data", str(data), "--out", str(out), *STEPS, "--parallel", how, "--resume"]
    started = start(n, folder, argv)
    time.sleep(delay)
    # It may have ended already.
    if started[rank].is_alive():
        os.kill(started[rank].pid, signal.SIGKILL)
    return end(started, folder)


@pytest.mark.parametrize(("n", "how"), [(2, "ddp"), (3, "ddp"), (2, "fsdp"), (4, "hsdp")])
def test_kills_of_random_ranks_at_random_moments(n: int, how: str, tmp_path: Path) -> None:
    data, straight, out = write_data(tmp_path), tmp_path / "straight", tmp_path / "killed"
    whole = train(n, straight, data, *STEPS, "--parallel", how)
    assert whole.codes == [0] * n
    random = python_generator(n)
    for _ in range(KILLS):
        rank = random.randrange(n)
        ended = kill_one(n, how, rank, random.uniform(0.3, 1.5) * whole.seconds, out, data)
        assert ended.codes == [0] * n or all(ended.codes), ended
        assert "Traceback" not in "".join(ended.errors), ended
        for path in checkpoints(out):
            read_state(path)  # every file is there with its SHA-256
    assert train(n, out, data, *STEPS, "--parallel", how, "--resume").codes == [0] * n
    assert losses(out) == losses(straight)
    for path in checkpoints(straight)[-1].glob("*.safetensors"):
        ours, theirs = load_file(checkpoints(out)[-1] / path.name), load_file(path)
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in ours)


PAGE = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text("utf-8")
# What the training operator of Kubernetes gives the pods of a PyTorchJob of two replicas.
JOB = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1"}
# The commands of a cluster, for two nodes that are both this machine.
CLUSTER = """
scontrol() { echo 127.0.0.1; }
srun() { "$@" & local first=$!; "$@" && wait $first; }
SLURM_JOB_NODELIST=here SLURM_NNODES=2 SLURM_JOB_ID=7
"""


def scripts_of_the_page(port: int) -> dict[str, str]:
    """Return each way of the page to start a run, as a script of bash for one machine."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    shell = [text for language, text in blocks if language == "sh"]
    one, two, slurm = (next(t for t in shell if word in t) for word in ("stand", "host1", "srun"))
    (yaml,) = (text for language, text in blocks if language == "yaml")
    (job,) = re.findall(r"command: \[(.*?)\]", yaml, re.DOTALL)
    first, second = re.findall(r"torchrun.*?(?=    # on)", two, re.DOTALL)
    both = f"{first} & first=$!\n{second} && wait $first"
    job = " ".join(word.strip().strip('"') for word in job.split(","))
    settings = " ".join(
        f"{name}={value}" for name, value in (JOB | {"PET_MASTER_PORT": port}).items()
    )
    pods = (
        f"export {settings}\nPET_NODE_RANK=0 {job} & first=$!\nPET_NODE_RANK=1 {job} && wait $first"
    )
    scripts = {"one machine": one, "two machines": both, "slurm": CLUSTER + slurm, "job": pods}
    return {name: text.replace("29500", str(port)) for name, text in scripts.items()}


@pytest.mark.parametrize("way", ["one machine", "two machines", "slurm", "job"])
def test_the_commands_of_the_page(way: str, tmp_path: Path) -> None:
    """A small run by the page's own words, with fewer processes, on this machine."""
    script = scripts_of_the_page(free_port())[way]
    steps = ["--max-steps", "12"]
    small = " ".join([*RUN[1:], *steps, "--threads", "1"])
    data = write_data(tmp_path)
    places = {"/data/tokens": str(data), "book.txt": str(data), "/shared/runs/big": "run"}
    places |= {
        "runs/book": "run",
        "--preset gpt2": small,
        "--batch-size 64": "",
        "host0": "127.0.0.1",
    }
    places |= {"--nproc-per-node 8": "--nproc-per-node 1"}
    for theirs, ours in places.items():
        script = script.replace(theirs, ours)
    script = re.sub(r"--batch-size 8 --max-steps 2000", small, script)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-e", "-c", re.sub(r"^gptfast .*$", "", script, flags=re.MULTILINE)],
        env={**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes (ddp, cpu)" in done.stdout
    assert train(2, tmp_path / "straight", data, *steps, "--threads", "1").codes == [0, 0]
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
