"""AdamW and the global gradient norm over all tensors of a call at once.

The launches find their tensors in a table of int64 columns on the device: where each tensor lies,
how many elements it has, and the first program that works on it.

    grad_norm: a program adds the squares of CHUNK elements in LANES running sums (fp32), then the
    lanes in fp64; one more launch adds the programs' sums, in fp64. Which numbers meet depends on
    shapes alone, not on addresses: what lies askew is copied first.
    adamw: a small launch takes the steps up by one and leaves each tensor's scalars, in fp64 up to
    the last rounding; then one launch updates every element with the reference's own operations.

lr (where it is on the device), norm and steps are only read there, so a CUDA graph can hold a step.
"""

import ctypes
import math
import sys

import torch
import triton
import triton.language as tl
from gptfast.kernels.reference import adamw as reference
from gptfast.kernels.triton import target
from gptfast.kernels.triton.adamw_tables import norm_plan, step_plan, table_on
from gptfast.kernels.triton.philox import in_order, philox
from torch import Tensor

# By architecture: elements a program, warps. Eight elements a thread are eight 128-bit loads in
# flight (fp32: p, g, m, v), and at under 64 registers an SM holds 1024 threads: 128 KB, where
# 4.8 TB/s times a microsecond ask for 36 KB of each SM.
STEP_CONFIGS = {"sm_80": (1024, 4), "sm_90": (2048, 8), "sm_100": (2048, 8), "gfx942": (2048, 4)}
# By architecture: warps. CHUNK and LANES are the grouping of the sum: the same everywhere.
NORM_CONFIGS = {"sm_80": 8, "sm_90": 8, "sm_100": 8, "gfx942": 4}
CHUNK, LANES = 1 << 15, 1 << 12
SEARCH = 256


@triton.jit
def _row_of(first_ptr, n_rows, SEARCH: tl.constexpr):
    """The row this program works on: the last whose first program is not after it."""
    program = tl.program_id(0).to(tl.int64)
    before = tl.full([SEARCH], 0, tl.int32)
    for i in range(0, n_rows, SEARCH):
        rows = i + tl.arange(0, SEARCH)
        first = tl.load(first_ptr + rows, mask=rows < n_rows, other=1 << 62)
        before += (first <= program).to(tl.int32)
    return tl.sum(before, axis=0) - 1


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    # bf16 as its bits: the interpreter's own conversions truncate.
    ptr = address.to(tl.pointer_type(tl.uint16 if DTYPE == tl.bfloat16 else DTYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, ALIGNED * DTYPE.primitive_bitwidth // 8)
    return ptr


@triton.jit
def _load(ptr, mask, DTYPE: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        x = tl.load(ptr, mask=mask, other=0)
    else:
        x = tl.load(ptr)
    if DTYPE == tl.bfloat16:
        x = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _bf16_bits(x, addend):
    """fp32 to bf16's bits: addend, to the low half, decides what rounds up. Inf and NaN stay."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = tl.where(tl.abs(x) < float("inf"), bits + addend, bits)
    return (tl.where(x == x, rounded, 0x7FC00000) >> 16).to(tl.uint16)


@triton.jit
def _store(ptr, x, mask, DTYPE: tl.constexpr, MASKED: tl.constexpr):
    if DTYPE == tl.bfloat16:
        # To nearest, ties to even.
        odd = (x.to(tl.uint32, bitcast=True) >> 16) & 1
        x = _bf16_bits(x, odd + 0x7FFF)
    else:
        x = x.to(DTYPE)
    if MASKED:
        tl.store(ptr, x, mask=mask)
    else:
        tl.store(ptr, x)


@triton.jit(do_not_specialize=["stride", "begin", "n_rows"])
def grad_norm_kernel(
    table_ptr,  # int64 (4, stride): first program, numel, address, first partial
    partial_ptr,
    stride,
    begin,
    n_rows,
    DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    SEARCH: tl.constexpr,
):
    table_ptr += begin
    table_ptr += _row_of(table_ptr, n_rows, SEARCH)
    chunk = tl.program_id(0) - tl.load(table_ptr)
    grad_ptr = _pointer(tl.load(table_ptr + stride * 2), DTYPE, 128 // DTYPE.primitive_bitwidth)
    grad_ptr += chunk * CHUNK
    n = tl.minimum(tl.load(table_ptr + stride) - chunk * CHUNK, CHUNK).to(tl.int32)
    lanes = tl.arange(0, LANES)
    squares = tl.full([LANES], 0.0, tl.float32)
    whole = n // LANES * LANES
    for i in range(0, whole, LANES):
        g = _load(grad_ptr + i + lanes, None, DTYPE, False)
        squares += g * g
    if whole < n:
        g = _load(grad_ptr + whole + lanes, lanes < n - whole, DTYPE, True)
        squares += g * g
    partial = tl.load(table_ptr + stride * 3) + chunk
    tl.store(partial_ptr + partial, tl.sum(squares.to(tl.float64), axis=0))


@triton.jit(do_not_specialize=["n"])
def grad_norm_sum_kernel(partial_ptr, norm_ptr, n, LANES: tl.constexpr):
    lanes = tl.arange(0, LANES)
    total = tl.full([LANES], 0.0, tl.float64)
    for i in range(0, n, LANES):
        total += tl.load(partial_ptr + i + lanes, mask=i + lanes < n, other=0.0)
    tl.store(norm_ptr, tl.sqrt(tl.sum(total, axis=0)).to(tl.float32))


@triton.jit(do_not_specialize=["stride"])
def adamw_steps_kernel(
    table_ptr,  # adamw_kernel's
    scalar_ptr,  # fp32 (5, stride): clip, decay, step size, root of bias 2, step
    lr_ptr,
    norm_ptr,
    stride,
    lr_high,
    lr_low,
    weight_decay_high,
    weight_decay_low,
    log_beta1_high,
    log_beta1_low,
    log_beta2_high,
    log_beta2_low,
    max_norm,
    LANES: tl.constexpr,
):
    rows = tl.program_id(0) * LANES + tl.arange(0, LANES)
    mask = rows < stride
    # A float argument is fp32; two of them are a double, to 2^-48.
    lr = tl.full([LANES], 0.0, tl.float64) + lr_high + lr_low
    if lr_ptr is not None:
        lr = tl.full([LANES], 0.0, tl.float64) + tl.load(lr_ptr).to(tl.float64)
    weight_decay = tl.full([LANES], 0.0, tl.float64) + weight_decay_high + weight_decay_low
    log_beta1 = tl.full([LANES], 0.0, tl.float64) + log_beta1_high + log_beta1_low
    log_beta2 = tl.full([LANES], 0.0, tl.float64) + log_beta2_high + log_beta2_low
    clip = tl.full([LANES], 1.0, tl.float64)
    proceed = mask
    if norm_ptr is not None:
        norm = tl.full([LANES], 0.0, tl.float64) + tl.load(norm_ptr).to(tl.float64)
        proceed = mask & (norm < float("inf"))
        clip = tl.minimum(max_norm / (norm + 1e-6), clip)
        # What tells the update to leave everything as it is.
        clip = tl.where(proceed, clip, float("nan"))
    # A program reads and writes its own rows' steps, before the update's programs start.
    step_ptr = tl.load(table_ptr + stride * 7 + rows, mask=mask, other=0)
    step_ptr = step_ptr.to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask=mask, other=0.0) + 1.0
    tl.store(step_ptr, step, mask=proceed)
    bias1 = 1.0 - tl.exp2(step.to(tl.float64) * log_beta1)
    bias2 = 1.0 - tl.exp2(step.to(tl.float64) * log_beta2)
    scalar_ptr += rows
    tl.store(scalar_ptr, clip.to(tl.float32), mask=mask)
    tl.store(scalar_ptr + stride, (1.0 - lr * weight_decay).to(tl.float32), mask=mask)
    tl.store(scalar_ptr + stride * 2, (lr / bias1).to(tl.float32), mask=mask)
    tl.store(scalar_ptr + stride * 3, tl.sqrt(bias2).to(tl.float32), mask=mask)
    tl.store(scalar_ptr + stride * 4, step, mask=mask)


@triton.jit(do_not_specialize=["stride", "begin", "n_rows", "seed"])
def adamw_kernel(
    table_ptr,  # int64 (9, stride): first program, numel, addresses (6), param_id
    scalar_ptr,
    stride,
    begin,
    n_rows,
    lerp,
    beta2,
    one_minus_beta2,
    eps,
    seed,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    FROM_GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    SEARCH: tl.constexpr,
):
    row = begin + _row_of(table_ptr + begin, n_rows, SEARCH)
    table_ptr += row
    scalar_ptr += row
    # int64, as the table: a tensor may have more than 2^31 elements.
    start = (tl.program_id(0) - tl.load(table_ptr)) * BLOCK
    remaining = tl.load(table_ptr + stride) - start
    clip = tl.load(scalar_ptr)
    decay = tl.load(scalar_ptr + stride)
    step_size = tl.load(scalar_ptr + stride * 2)
    root_bias2 = tl.load(scalar_ptr + stride * 3)
    # Ahead of the branch: one wait for all that the tensors' own loads hang on.
    param = tl.load(table_ptr + stride * 2)
    grad = tl.load(table_ptr + stride * 3)
    exp_avg = tl.load(table_ptr + stride * 4)
    exp_avg_sq = tl.load(table_ptr + stride * 5)
    elements = tl.arange(0, BLOCK)
    mask = elements < remaining
    # A mask that may end anywhere costs the wide loads: only a tensor's last block has one.
    whole = (remaining >= BLOCK) & (clip == clip)
    part = (remaining < BLOCK) & (clip == clip)
    for MASKED in tl.static_range(2):
        if part if MASKED else whole:
            param_ptr = _pointer(param, PARAM, ALIGNED) + start + elements
            grad_ptr = _pointer(grad, GRAD, ALIGNED) + start + elements
            exp_avg_ptr = _pointer(exp_avg, EXP_AVG, ALIGNED) + start + elements
            exp_avg_sq_ptr = _pointer(exp_avg_sq, EXP_AVG_SQ, ALIGNED) + start + elements
            if MASTER:
                master_ptr = _pointer(tl.load(table_ptr + stride * 6), tl.float32, ALIGNED)
                master_ptr += start + elements
                p = _load(master_ptr, mask, tl.float32, MASKED)
            else:
                p = _load(param_ptr, mask, PARAM, MASKED)
            g = _load(grad_ptr, mask, GRAD, MASKED) * clip
            m = _load(exp_avg_ptr, mask, EXP_AVG, MASKED)
            v = _load(exp_avg_sq_ptr, mask, EXP_AVG_SQ, MASKED)
            # As torch.lerp: from the nearer end, fused.
            m = tl.fma(tl.full([BLOCK], lerp, tl.float32), g - m, g if FROM_GRAD else m)
            v = v * beta2 + g * one_minus_beta2 * g
            denominator = tl.div_rn(tl.sqrt_rn(v), root_bias2) + eps
            p = p * decay - step_size * tl.div_rn(m, denominator)
            _store(exp_avg_ptr, m, mask, EXP_AVG, MASKED)
            _store(exp_avg_sq_ptr, v, mask, EXP_AVG_SQ, MASKED)
            if MASTER:
                _store(master_ptr, p, mask, tl.float32, MASKED)
            if STOCHASTIC:
                # A counter serves four elements; start is a multiple of four.
                counter = (start >> 2) + tl.arange(0, BLOCK // 4)
                param_id = tl.load(table_ptr + stride * 8)
                step = tl.load(scalar_ptr + stride * 4).to(tl.int64)
                domain = tl.full([1], 2, tl.uint32)
                w0, w1, w2, w3 = philox(counter, param_id, step, domain, seed)
                bits = _bf16_bits(p, in_order(w0, w1, w2, w3) >> 16)
                _store(param_ptr, bits, mask, tl.uint16, MASKED)
            else:
                _store(param_ptr, p, mask, PARAM, MASKED)


def grad_norm(grads: list[Tensor]) -> Tensor:
    """The 2-norm over all gradients together, 0-d fp32."""
    if torch.float64 in [g.dtype for g in grads]:
        return reference.grad_norm(grads)
    device = grads[0].device
    plan = norm_plan(grads, CHUNK)
    table_ptr = table_on(plan.values, device)
    n_partials = sum(programs for *_, programs in plan.launches)
    partials = torch.empty(n_partials, dtype=torch.float64, device=device)
    norm = torch.empty((), dtype=torch.float32, device=device)
    warps = NORM_CONFIGS[target.arch()]
    for (dtype, _), begin, n_rows, programs in plan.launches:
        if programs:
            grad_norm_kernel[(programs,)](
                table_ptr,
                partials,
                plan.n_rows,
                begin,
                n_rows,
                DTYPE=dtype,
                CHUNK=CHUNK,
                LANES=LANES,
                SEARCH=SEARCH,
                num_warps=warps,
            )
    grad_norm_sum_kernel[(1,)](partials, norm, n_partials, LANES=LANES, num_warps=2 * warps)
    return norm


def _two_floats(x: float) -> tuple[float, float]:
    high = ctypes.c_float(x).value
    return high, ctypes.c_float(x - high).value if math.isfinite(high) else 0.0


def _read_on_device(lr: Tensor, device: torch.device) -> bool:
    return lr.device == device


def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    grad_norm: Tensor | None,
    max_norm: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    param_ids: list[int],
    stochastic: bool,
    seed: int,
) -> None:
    """One step in place. masters: empty, or one fp32 tensor per parameter."""
    columns = [params, grads, exp_avgs, exp_avg_sqs, *([masters] if masters else [])]
    if torch.float64 in [t.dtype for column in columns for t in column]:
        lists = (params, grads, exp_avgs, exp_avg_sqs, masters, steps)
        numbers = (max_norm, beta1, beta2, eps, weight_decay, param_ids, stochastic, seed)
        return reference.adamw(*lists, lr, grad_norm, *numbers)
    device = params[0].device
    block, warps = STEP_CONFIGS[target.arch()]
    plan = step_plan(columns, steps, param_ids, stochastic, block)
    table_ptr = table_on(plan.values, device)
    scalars = torch.empty(5, plan.n_rows, dtype=torch.float32, device=device)
    resident = _read_on_device(lr, device)
    adamw_steps_kernel[(triton.cdiv(plan.n_rows, SEARCH),)](
        table_ptr,
        scalars,
        lr if resident else None,
        grad_norm,
        plan.n_rows,
        *_two_floats(0.0 if resident else float(lr)),
        *_two_floats(weight_decay),
        # beta = 0: the smallest double stands for it, and 1 - beta^step is 1 all the same.
        *_two_floats(math.log2(beta1 or sys.float_info.min)),
        *_two_floats(math.log2(beta2 or sys.float_info.min)),
        _two_floats(max_norm)[0],
        LANES=SEARCH,
        num_warps=4,
    )
    # torch.lerp starts from the end that is nearer.
    weight = _two_floats(1 - beta1)[0]
    from_grad = weight >= 0.5
    numbers = (weight - 1 if from_grad else weight, beta2, 1 - beta2, eps)
    for (*dtypes, aligned), begin, n_rows, programs in plan.launches:
        if programs:
            adamw_kernel[(programs,)](
                table_ptr,
                scalars,
                plan.n_rows,
                begin,
                n_rows,
                *(_two_floats(x)[0] for x in numbers),
                seed,
                *dtypes[:4],
                MASTER=bool(masters),
                STOCHASTIC=stochastic,
                FROM_GRAD=from_grad,
                ALIGNED=aligned,
                BLOCK=block,
                SEARCH=SEARCH,
                num_warps=warps,
                # Each operation rounds as the reference's does; the kernel waits for memory anyway.
                enable_fp_fusion=False,
            )
    for tensors, used in zip(zip(*columns, strict=True), plan.used or [], strict=False):
        for i, (tensor, copy) in enumerate(zip(tensors, used, strict=True)):
            # All but the gradient, which only was read.
            if copy is not tensor and i != 1:
                tensor.copy_(copy)
