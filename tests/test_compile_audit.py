"""Compile every Triton kernel in every configuration ahead of time; check what compilers report."""

import os
import re
from pathlib import Path

import pytest
from compile_audit import (
    CHIPS,
    HEADING,
    LIKE_SM_80,
    REPORT,
    Kernel,
    audit_all,
    report,
    stored_kernels,
)

triton = pytest.importorskip("triton")
target = pytest.importorskip("gptfast.kernels.triton.target")

# These kernels read a handful of numbers, so none of their loads can be wide.
SMALL = {"adamw_steps_kernel", "grad_norm_sum_kernel", "attention_combine_kernel"}


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    """Return the kernels as compiled from the same inputs earlier; CI compiles sm_90's again.

    That the stored ones are of the same sources and the same Triton, their digest says.
    """
    stored = stored_kernels()
    if stored is None:
        return audit_all(CHIPS)
    if os.environ.get("CI") != "true":
        return stored
    by_arch = {arch: [k for k in stored if k.arch == arch] for arch in CHIPS}
    by_arch["sm_90"] = audit_all(["sm_90"])
    return [kernel for kernels in by_arch.values() for kernel in kernels]


def failing(kernels: list[Kernel], arch: str | None, fits) -> list[str]:  # type: ignore[no-untyped-def]
    return [str(k) for k in kernels if arch in (None, k.arch) and not fits(k)]


def test_every_kernel_compiles_everywhere(kernels: list[Kernel]) -> None:
    names = {arch: {k.kernel for k in kernels if k.arch == arch} for arch in CHIPS}
    assert len(names["sm_90"]) > 10
    assert all(names[arch] == names["sm_90"] for arch in CHIPS if arch not in LIKE_SM_80), names
    multiplying = {k.kernel for k in kernels if k.dots}
    assert all(names[arch] >= multiplying for arch in LIKE_SM_80), names


def test_shared_memory_fits(kernels: list[Kernel]) -> None:
    assert not failing(kernels, None, lambda k: k.shared <= CHIPS[k.arch].shared_limit)


# The kernels with a choice of tiles. All others fit any GPU for which they are compiled so.
WITH_CHOICE = re.compile("attention_(fwd|bwd).*|linear_cross_entropy_dweight_kernel")
# All GPUs of these two generations have the same shared memory.
UNIFORM = ("sm_90", "sm_100")


def test_a_kernel_without_a_choice_of_tiles_fits_every_gpu(kernels: list[Kernel]) -> None:
    def fits(k: Kernel) -> bool:
        least = CHIPS[k.arch].shared_limit if k.arch in UNIFORM else 48 << 10
        return bool(k.shared <= least or WITH_CHOICE.fullmatch(k.kernel))

    assert not failing(kernels, None, fits)


@pytest.mark.parametrize("arch", CHIPS)
def test_a_class_of_tiles_takes_no_more_than_it_says(kernels: list[Kernel], arch: str) -> None:
    tiles = "sm_80" if arch in LIKE_SM_80 else arch
    assert not failing(kernels, arch, lambda k: k.shared <= target.SHARED_BYTES[tiles])


# Few queries with the largest head dim, in fp64: no tile that products take needs fewer registers.
SPILLING = "attention fp32 D=256 T=32"
# The ptxas of Triton 3.6 spills a few registers in three fp32 kernels, that of 3.7 in none.
MAX_SPILLED_BYTES = 24 if triton.__version__.startswith("3.6.") else 0


def test_no_spills_on_hopper(kernels: list[Kernel]) -> None:
    assert not failing(
        kernels, "sm_90", lambda k: k.spills <= MAX_SPILLED_BYTES or k.case == SPILLING
    )


def test_large_products_of_16_bits_use_wgmma(kernels: list[Kernel]) -> None:
    assert not failing(kernels, "sm_90", lambda k: k.slow_dots == 0)
    assert sum(k.large_dots for k in kernels if k.arch == "sm_90") > 10


def test_memory_bound_kernels_load_128_bits(kernels: list[Kernel]) -> None:
    memory_bound = [k for k in kernels if not k.dots and k.kernel not in SMALL]
    assert len({k.kernel for k in memory_bound}) > 5
    assert not failing(memory_bound, "sm_90", lambda k: k.load_bits >= 128)


def test_the_report_is_up_to_date(kernels: list[Kernel]) -> None:
    """The report and its data are what `make audit` writes."""
    written = Path(REPORT).read_text()
    if HEADING.format(triton.__version__) not in written:
        pytest.skip(f"the report is of another Triton than {triton.__version__}")
    assert written == report(kernels), "the kernels compile to something else: run make audit"
    assert stored_kernels() == kernels, "the stored kernels are of other sources: run make audit"
