"""Two hosts, as network namespaces joined by a link that is slowed and cut.

It takes a minute and needs root, so it runs with `make test-distributed` only.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import RUN, Ended, apart, losses, train, write_data

from gptfast.weights.checkpoint import checkpoints, read_state

pytestmark = pytest.mark.skipif(
    not int(os.environ.get("GPTFAST_TEST_DISTRIBUTED", "0")),
    reason="takes a minute: make test-distributed",
)
DIST_TIMEOUT_S, START_S = 8, 120
ADDRESSES = "10.213.7.1", "10.213.7.2"


def command(line: str) -> None:
    """Run a command; raise OSError with what it says if it cannot be run."""
    try:
        subprocess.run(line.split(), check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise OSError(f"{line}: {error.stderr.strip()}") from None


class Hosts:
    """Two network namespaces with a link between them."""

    def __init__(self) -> None:
        self.names = [f"gptfast-{os.getpid()}-{side}" for side in "ab"]
        self.links = [f"gf{os.getpid() % 10**6}{side}" for side in "ab"]
        self.processes: list[subprocess.Popen] = []

    def join(self) -> None:
        """Make both and their link. Raises OSError where that is not to be had."""
        for name in self.names:
            command(f"ip netns add {name}")
        command(f"ip link add {self.links[0]} type veth peer name {self.links[1]}")
        for name, link, address in zip(self.names, self.links, ADDRESSES, strict=True):
            command(f"ip link set {link} netns {name}")
            command(f"ip -n {name} address add {address}/24 dev {link}")
            command(f"ip -n {name} link set {link} up")
            command(f"ip -n {name} link set lo up")

    def slow(self, rate: str) -> None:
        """Let so much through in either direction. Raises OSError if the kernel cannot."""
        for name, link in zip(self.names, self.links, strict=True):
            how = f"tbf rate {rate} burst 16kbit latency 200ms"
            command(f"ip netns exec {name} tc qdisc add dev {link} root {how}")

    def cut(self) -> None:
        """Cut the link."""
        command(f"ip -n {self.names[1]} link set {self.links[1]} down")

    def start(self, out: Path, data: Path, *more: str) -> None:
        """Start a process of a run on either host."""
        argv = [sys.executable, "-m", "gptfast", *RUN, "--data", str(data), "--out", str(out)]
        for rank, (name, link) in enumerate(zip(self.names, self.links, strict=True)):
            environment = {
                **{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
                **{"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29517"},
                **{"LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": link, "OMP_NUM_THREADS": "1"},
                # An abort shows where.
                **{"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONFAULTHANDLER": "1"},
            }
            # A name of its own: a process of another host cannot be killed from here.
            inside = ["unshare", "--uts", "sh", "-c", f'hostname host{rank}; exec "$@"', "sh"]
            self.processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, *inside, *argv, *more],
                    env={**os.environ, **environment},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def end(self, within_s: float) -> Ended:
        """Wait for the processes; fail if one takes longer."""
        begin, out, errors = time.monotonic(), [], []
        for process in self.processes:
            left = max(0.1, within_s - (time.monotonic() - begin))
            texts = process.communicate(timeout=left)
            out.append(texts[0])
            errors.append(texts[1])
        codes = [process.returncode for process in self.processes]
        return Ended(codes, errors, out, time.monotonic() - begin).shown()

    def remove(self) -> None:
        """End what is left."""
        for process in self.processes:
            process.kill()
            process.communicate()
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        subprocess.run(["ip", "link", "delete", self.links[0]], capture_output=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    made = Hosts()
    try:
        made.join()
    except OSError as error:
        made.remove()
        pytest.skip(f"network namespaces are not to be had: {error}")
    yield made
    made.remove()


def wait_for_step(out: Path, step: int) -> None:
    """Return once a checkpoint of that step or a later one is written."""
    end = time.monotonic() + START_S
    while not any(int(path.name[-8:]) >= step for path in checkpoints(out)):
        assert time.monotonic() < end, "the run does not begin"
        time.sleep(0.1)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_link_that_is_cut(how: str, hosts: Hosts, tmp_path: Path) -> None:
    data, out = write_data(tmp_path), tmp_path / "run"
    more = "--max-steps", "100000", "--dist-timeout", str(DIST_TIMEOUT_S), "--parallel", how
    hosts.start(out, data, *more)
    wait_for_step(out, 10)
    hosts.cut()
    # A few seconds more: each finds out who is gone, and Python ends.
    ended = hosts.end(DIST_TIMEOUT_S + 20)
    assert ended.codes == [1, 1], ended
    assert "Traceback" not in "".join(ended.errors)
    # Neither can tell the other, so each host has its line.
    for errors, words in zip(ended.errors, ("rank 1 (process", "reaches rank 0"), strict=True):
        told = [line for line in errors.splitlines() if line.startswith("gptfast: ")]
        assert len(told) == 1 and words in told[0], ended
    for path in checkpoints(out):
        read_state(path)  # every file is there with its SHA-256
    step = read_state(checkpoints(out)[-1])["step"]
    again = train(2, out, data, "--max-steps", str(step + 2), "--resume")
    assert again.codes == [0, 0], again


def test_a_link_that_is_slow(hosts: Hosts, tmp_path: Path) -> None:
    """The run takes longer, and is the same bit for bit."""
    data, more = write_data(tmp_path), ("--max-steps", "12", "--threads", "1")
    try:
        hosts.slow("4mbit")
    except OSError as error:
        pytest.skip(f"links cannot be slowed: {error}")
    hosts.start(tmp_path / "slow", data, *more)
    ended = hosts.end(START_S)
    assert ended.codes == [0, 0], ended
    assert train(2, tmp_path / "fast", data, *more, before=apart).codes == [0, 0]
    assert losses(tmp_path / "slow") == losses(tmp_path / "fast")
