"""Kill processes of a run at random moments: what is left is whole, and the run ends the same.

It takes minutes, so it runs with `make test-distributed` only, which sets GPTFAST_TEST_DISTRIBUTED
to the number of kills.
"""

import os
import signal
import time
from pathlib import Path

import pytest
from ranks import RUN, Ended, end, losses, start, train, write_data
from safetensors.torch import load_file
from seeds import python_generator

from gptfast.weights.checkpoint import checkpoints, read_state

KILLS = int(os.environ.get("GPTFAST_TEST_DISTRIBUTED", "0"))
pytestmark = pytest.mark.skipif(not KILLS, reason="takes minutes: make test-distributed")
# A save after each step, so that many kills fall into one.
STEPS = ["--max-steps", "40", "--checkpoint-interval", "1"]


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


@pytest.mark.parametrize(("n", "how"), [(2, "ddp"), (3, "ddp"), (2, "fsdp")])
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
