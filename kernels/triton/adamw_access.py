"""How AdamW's kernels look up a tensor in the tables, and how they load and store its elements."""

import triton
import triton.language as tl

from gptfast.kernels.triton.adamw_tables import NormRow, StepRow

# The columns of the tables.
NORM_FIRST_PROGRAM = tl.constexpr(NormRow._fields.index("first_program"))
NORM_NUMEL = tl.constexpr(NormRow._fields.index("numel"))
NORM_GRAD = tl.constexpr(NormRow._fields.index("grad"))
NORM_FIRST_PARTIAL = tl.constexpr(NormRow._fields.index("first_partial"))
COLUMN_FIRST_PROGRAM = tl.constexpr(StepRow._fields.index("first_program"))
COLUMN_NUMEL = tl.constexpr(StepRow._fields.index("numel"))
COLUMN_PARAM = tl.constexpr(StepRow._fields.index("param"))
COLUMN_GRAD = tl.constexpr(StepRow._fields.index("grad"))
COLUMN_EXP_AVG = tl.constexpr(StepRow._fields.index("exp_avg"))
COLUMN_EXP_AVG_SQ = tl.constexpr(StepRow._fields.index("exp_avg_sq"))
COLUMN_MASTER = tl.constexpr(StepRow._fields.index("master"))
COLUMN_STEP = tl.constexpr(StepRow._fields.index("step"))
COLUMN_PARAM_ID = tl.constexpr(StepRow._fields.index("param_id"))
# The columns of the fp32 scalars, which adamw_steps_kernel computes for adamw_kernel.
SCALAR_CLIP = tl.constexpr(0)
SCALAR_DECAY = tl.constexpr(1)
SCALAR_STEP_SIZE = tl.constexpr(2)
SCALAR_ROOT_BIAS2 = tl.constexpr(3)
SCALAR_STEP = tl.constexpr(4)
N_SCALARS = 5

BF16_NAN = tl.constexpr(0x7FC00000)


@triton.jit
def row_of(first_ptr, n_rows, SEARCH: tl.constexpr):
    """Return the row this program works on: the last whose first program is not after it."""
    program = tl.program_id(0).to(tl.int64)
    before = tl.full([SEARCH], 0, tl.int32)
    for i in range(0, n_rows, SEARCH):
        rows = i + tl.arange(0, SEARCH)
        first = tl.load(first_ptr + rows, mask=rows < n_rows, other=1 << 62)
        before += (first <= program).to(tl.int32)
    return tl.sum(before, axis=0) - 1


@triton.jit
def pointer_to(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a pointer to the address, which is a multiple of ALIGNED elements (0: unknown)."""
    # bf16 as its bits: the interpreter's own conversions truncate.
    ptr = address.to(tl.pointer_type(tl.uint16 if DTYPE == tl.bfloat16 else DTYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, ALIGNED * DTYPE.primitive_bitwidth // 8)
    return ptr


@triton.jit
def load(ptr, mask, DTYPE: tl.constexpr, MASKED: tl.constexpr):
    """Return fp32 values from a pointer of `pointer_to`."""
    if MASKED:
        x = tl.load(ptr, mask=mask, other=0)
    else:
        x = tl.load(ptr)
    if DTYPE == tl.bfloat16:
        x = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def bf16_bits(x, addend):
    """Return the upper half of the bits of x + addend; infinities and NaN stay what they are.

    addend decides which values round up: it is added to the bits, of which bf16 drops the low half.
    """
    bits = x.to(tl.uint32, bitcast=True)
    rounded = tl.where(tl.abs(x) < float("inf"), bits + addend, bits)
    return (tl.where(x == x, rounded, BF16_NAN) >> 16).to(tl.uint16)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Round fp32 x to DTYPE, to nearest, ties to even; bf16 is returned as its bits."""
    if DTYPE == tl.bfloat16:
        odd = (x.to(tl.uint32, bitcast=True) >> 16) & 1
        x = bf16_bits(x, odd + 0x7FFF)
    else:
        x = x.to(DTYPE)
    return x


@triton.jit
def follow(master, param, DTYPE: tl.constexpr):
    """Return fp32 master, or fp32 param where it is not the master rounded to DTYPE."""
    own = rounded(master, DTYPE)
    if DTYPE == tl.bfloat16:
        own = (own.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    own = own.to(tl.float32)
    same = own.to(tl.uint32, bitcast=True) == param.to(tl.uint32, bitcast=True)
    return tl.where(same | ((own != own) & (param != param)), master, param)


@triton.jit
def store(ptr, x, mask, DTYPE: tl.constexpr, MASKED: tl.constexpr):
    """Round fp32 x to DTYPE and store it."""
    x = rounded(x, DTYPE)
    if MASKED:
        tl.store(ptr, x, mask=mask)
    else:
        tl.store(ptr, x)
