"""The choice of tiles by what a GPU has, on made-up GPUs."""

import logging
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from compile_audit import CHIPS  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

from gptfast import ops  # noqa: E402
from gptfast.kernels.reference import attention as reference  # noqa: E402
from gptfast.kernels.triton import attention_fwd, attention_tiles, cross_entropy, target  # noqa: E402

KERNEL = ("some_kernel", "16-bit", 64)


class FakeDriver:
    """A driver of GPUs that are not there: (backend, capability, bytes of shared memory) each."""

    def __init__(self, *devices: tuple[str, int | str, int]) -> None:
        self.devices, self.current, self.asked = devices, 0, 0
        self.utils = SimpleNamespace(get_device_properties=self.properties)

    def get_current_device(self) -> int:
        return self.current

    def get_current_target(self) -> SimpleNamespace:
        backend, arch, _ = self.devices[self.current]
        return SimpleNamespace(backend=backend, arch=arch)

    def properties(self, index: int) -> dict[str, int]:
        self.asked += 1
        return {"max_shared_mem": self.devices[index][2]}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Return a function that puts GPUs into this machine."""
    native = SimpleNamespace(runtime=SimpleNamespace(interpret=False))
    monkeypatch.setattr(target, "triton", SimpleNamespace(knobs=native))
    monkeypatch.setattr(target, "_lowered", {})

    def put(*devices: tuple[str, int | str, int]) -> FakeDriver:
        fake = FakeDriver(*devices)
        monkeypatch.setattr(target, "driver", SimpleNamespace(active=fake))
        return fake

    return put


@pytest.mark.parametrize(
    ("capability", "kilobytes", "arch", "fitting"),
    [
        (75, 64, "sm_80", "sm_75"),
        (80, 163, "sm_80", "sm_80"),
        (86, 99, "sm_80", "sm_80"),
        (87, 163, "sm_80", "sm_80"),
        (89, 99, "sm_80", "sm_80"),
        (90, 227, "sm_90", "sm_90"),
        (100, 227, "sm_100", "sm_100"),
        (103, 227, "sm_100", "sm_100"),
        (110, 227, "sm_100", "sm_100"),
        (120, 99, "sm_80", "sm_80"),
        (121, 99, "sm_80", "sm_80"),
        # None has so little; who knows what comes.
        (90, 163, "sm_90", "sm_80"),
        (100, 64, "sm_100", "sm_75"),
    ],
)
def test_nvidia(gpus, capability: int, kilobytes: int, arch: str, fitting: str) -> None:  # type: ignore[no-untyped-def]
    gpus(("cuda", capability, kilobytes << 10))
    assert target.arch() == arch
    assert target.fitting(KERNEL) == fitting


def test_amd(gpus) -> None:  # type: ignore[no-untyped-def]
    gpus(("hip", "gfx942", 64 << 10))
    assert target.arch() == target.fitting(KERNEL) == "gfx942"


def test_each_device_is_asked_once(gpus) -> None:  # type: ignore[no-untyped-def]
    fake = gpus(("cuda", 90, 227 << 10), ("cuda", 120, 99 << 10))
    for _ in range(3):
        fake.current = 0
        assert target.fitting(KERNEL) == "sm_90"
        fake.current = 1
        assert target.fitting(KERNEL) == "sm_80"
    assert fake.asked == 2


@pytest.mark.parametrize("name", [name for name in CHIPS if name != "gfx942"])
def test_every_audited_gpu_gets_tiles_that_it_has_room_for(gpus, name: str) -> None:  # type: ignore[no-untyped-def]
    chip = CHIPS[name]
    gpus((chip.backend, chip.arch, chip.shared_limit))
    assert target.SHARED_BYTES[target.fitting(KERNEL)] <= chip.shared_limit


def test_each_class_has_every_tile() -> None:
    for table in (attention_tiles.FWD, attention_tiles.BWD_DQ, attention_tiles.BWD_DK_DV):
        assert set(table) == set(target.SHARED_BYTES)
        for arch, kinds in table.items():
            assert set(kinds) == set(table["sm_90"])
            for kind, rows in kinds.items():
                largest = 128 if (kind, arch) == ("fp64", "sm_75") else attention_tiles.MAX_D
                assert list(rows) == [D for D in (16, 32, 64, 128, 256) if D <= largest]
    assert set(cross_entropy.WEIGHT_TILES) == set(target.SHARED_BYTES)


def test_what_has_no_tile_is_for_the_reference(gpus, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    attention_tiles._log_once.cache_clear()
    few, many = (torch.float32, 5, 5, 200), (torch.float32, 512, 512, 200)
    with caplog.at_level(logging.WARNING, "gptfast"):
        gpus(("cuda", 90, 227 << 10))
        assert attention_tiles.has_tile(*few)
        gpus(("cuda", 75, 64 << 10))
        assert attention_tiles.has_tile(*many) and attention_tiles.has_tile(torch.float16, *few[1:])
        assert attention_tiles.has_tile(torch.float32, 1, 5, 200, decoding=True)
        assert not caplog.messages
        assert not attention_tiles.has_tile(*few) and not attention_tiles.has_tile(*few)
    assert len(caplog.messages) == 1 and "200" in caplog.messages[0]


def launcher(needs: dict[str, int], has: int):  # type: ignore[no-untyped-def]
    """Return a launcher of KERNEL on a GPU with so many bytes, and the tiles that it tries."""
    tried: list[str] = []

    @target.stepping_down
    def launch() -> str:
        tried.append(target.fitting(KERNEL))
        if needs[tried[-1]] > has:
            raise OutOfResources(needs[tried[-1]], has, "shared memory")
        return tried[-1]

    return launch, tried


def test_a_launch_without_room_steps_down_once(gpus, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    gpus(("cuda", 90, 227 << 10))
    launch, tried = launcher({"sm_90": 200_000, "sm_80": 90_000}, has=100_000)
    with caplog.at_level(logging.WARNING, "gptfast"):
        assert launch() == launch() == "sm_80"
    assert tried == ["sm_90", "sm_80", "sm_80"]
    (line,) = caplog.messages
    for word in (*map(str, KERNEL), "sm_90", "sm_80", "200000", "100000", "shared memory"):
        assert word in line
    # Another kernel keeps its tiles.
    assert target.fitting(("other_kernel",)) == "sm_90"


def test_it_steps_down_until_there_is_room(gpus) -> None:  # type: ignore[no-untyped-def]
    gpus(("cuda", 100, 227 << 10))
    needs = {"sm_100": 200_000, "sm_80": 90_000, "sm_75": 60_000}
    launch, tried = launcher(needs, has=60_000)
    assert launch() == "sm_75"
    assert tried == ["sm_100", "sm_80", "sm_75"]


def test_without_a_smaller_tile_the_error_stays(gpus) -> None:  # type: ignore[no-untyped-def]
    gpus(("cuda", 75, 64 << 10))
    launch, tried = launcher({"sm_75": 60_000}, has=50_000)
    with pytest.raises(OutOfResources, match="60000"):
        launch()
    assert tried == ["sm_75"]


def test_the_error_of_a_kernel_without_choice_is_no_reason_to_step_down(gpus) -> None:  # type: ignore[no-untyped-def]
    gpus(("cuda", 90, 227 << 10))
    launch, _ = launcher({"sm_90": 1}, has=2)
    launch()

    @target.stepping_down
    def other() -> None:
        raise OutOfResources(3, 2, "threads")

    with pytest.raises(OutOfResources):
        other()
    assert target.fitting(KERNEL) == "sm_90"


def test_with_two_kernels_the_one_without_room_steps_down(gpus) -> None:  # type: ignore[no-untyped-def]
    gpus(("cuda", 90, 227 << 10))

    @target.stepping_down
    def launch() -> tuple[str, str]:
        first = target.fitting(("first",))
        if (second := target.fitting(("second",))) == "sm_90":
            raise OutOfResources(3, 2, "shared memory")
        return first, second

    assert launch() == ("sm_90", "sm_80")


class Crowded:
    """A kernel for which the GPU has too little room unless its tile is that of sm_80."""

    def __init__(self, kernel) -> None:  # type: ignore[no-untyped-def]
        self.kernel, self.tiles = kernel, []  # type: ignore[var-annotated]

    def __getitem__(self, grid: tuple):  # type: ignore[no-untyped-def]
        def run(*args: object, **options: object) -> None:
            self.tiles.append(options["BLOCK_M"])
            if options["BLOCK_M"] == attention_tiles.FWD["sm_90"]["16-bit"][16][0]:
                raise OutOfResources(200_000, 100_000, "shared memory")
            self.kernel[grid](*args, **options)

        return run


def test_attention_with_a_smaller_tile(triton: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "_lowered", {})
    monkeypatch.setattr(target, "arch", lambda: "sm_90")
    crowded = Crowded(attention_fwd.attention_fwd_kernel)
    monkeypatch.setattr(attention_fwd, "attention_fwd_kernel", crowded)
    q, k, v = (torch.randn(1, 1, 5, 16).half() for _ in range(3))
    expected, _ = reference.attention_fwd(q, k, v, 0.25, 0.0, None, None)
    for _ in range(2):
        torch.testing.assert_close(ops.attention(q, k, v), expected, rtol=1e-2, atol=1e-3)
    sizes = [attention_tiles.FWD[arch]["16-bit"][16][0] for arch in ("sm_90", "sm_80", "sm_80")]
    assert crowded.tiles == sizes
