"""AdamW and the global gradient norm, for all tensors of a call at once.

    norm = sqrt(sum g^2);  g *= min(1, max_norm / (norm + 1e-6))
    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    p = p (1 - lr wd) - lr / (1 - b1^step) * m / (sqrt(v) / sqrt(1 - b2^step) + eps)

The kernels look up their tensors in a table on the device, a row per tensor (adamw_tables.py).
Norm: a program adds the squares of CHUNK elements in LANES fp32 sums, then these in fp64; a second
launch adds the programs' sums. Which numbers are added to which depends on shapes alone.
Step: a small launch increments the steps and computes each tensor's scalars in fp64; a second one
updates every element. lr (if it is on the device), norm and steps are only read on the device, so a
CUDA graph can hold a step.
"""

import ctypes
import functools
import math
import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.kernels.reference import adamw as reference
from gptfast.kernels.triton import target
from gptfast.kernels.triton.adamw_access import (
    COLUMN_EXP_AVG,
    COLUMN_EXP_AVG_SQ,
    COLUMN_FIRST_PROGRAM,
    COLUMN_GRAD,
    COLUMN_MASTER,
    COLUMN_NUMEL,
    COLUMN_PARAM,
    COLUMN_PARAM_ID,
    COLUMN_STEP,
    N_SCALARS,
    NORM_FIRST_PARTIAL,
    NORM_FIRST_PROGRAM,
    NORM_GRAD,
    NORM_NUMEL,
    SCALAR_CLIP,
    SCALAR_DECAY,
    SCALAR_ROOT_BIAS2,
    SCALAR_STEP,
    SCALAR_STEP_SIZE,
    bf16_bits,
    follow,
    load,
    pointer_to,
    row_of,
    store,
)
from gptfast.kernels.triton.adamw_tables import norm_plan, step_plan
from gptfast.kernels.triton.launch import launch
from gptfast.kernels.triton.philox import halves_in_order, philox

# arch: (elements a program, num_warps). With eight elements a thread, eight 128-bit loads are in
# flight (fp32: p, g, m, v). With less than 64 registers a thread, an SM holds 1024 threads: 128 KB
# in flight, while 4.8 TB/s times a microsecond need 36 KB of each SM.
STEP_CONFIGS = {"sm_80": (1024, 4), "sm_90": (2048, 8), "sm_100": (2048, 8), "gfx942": (2048, 4)}
# arch: num_warps. CHUNK and LANES decide the order of the sum: they are the same everywhere.
NORM_CONFIGS = {"sm_80": 8, "sm_90": 8, "sm_100": 8, "gfx942": 4}
CHUNK, LANES = 1 << 15, 1 << 12
# Rows of the table that a program looks at at once.
SEARCH = 256

# The third counter word of Philox for stochastic rounding (dropout has another).
PHILOX_DOMAIN = tl.constexpr(2)


@triton.jit(do_not_specialize=["stride", "begin", "n_rows"])
def grad_norm_kernel(
    table_ptr,  # int64 (columns of NormRow, stride)
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
    table_ptr += row_of(table_ptr + stride * NORM_FIRST_PROGRAM, n_rows, SEARCH)
    chunk = tl.program_id(0) - tl.load(table_ptr + stride * NORM_FIRST_PROGRAM)
    grad = tl.load(table_ptr + stride * NORM_GRAD)
    grad_ptr = pointer_to(grad, DTYPE, 128 // DTYPE.primitive_bitwidth) + chunk * CHUNK
    numel = tl.load(table_ptr + stride * NORM_NUMEL)
    n = tl.minimum(numel - chunk * CHUNK, CHUNK).to(tl.int32)
    lanes = tl.arange(0, LANES)
    squares = tl.full([LANES], 0.0, tl.float32)
    whole = n // LANES * LANES
    for i in range(0, whole, LANES):
        g = load(grad_ptr + i + lanes, None, DTYPE, False)
        squares += g * g
    if whole < n:
        g = load(grad_ptr + whole + lanes, lanes < n - whole, DTYPE, True)
        squares += g * g
    partial = tl.load(table_ptr + stride * NORM_FIRST_PARTIAL) + chunk
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
    scalar_ptr,  # fp32 (N_SCALARS, stride)
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
    # A float argument is fp32; two of them hold a double up to 2^-48 of it.
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
        # A clip of NaN tells adamw_kernel to change nothing.
        clip = tl.where(proceed, clip, float("nan"))
    step_ptr = tl.load(table_ptr + stride * COLUMN_STEP + rows, mask=mask, other=0)
    step_ptr = step_ptr.to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask=mask, other=0.0) + 1.0
    tl.store(step_ptr, step, mask=proceed)
    bias1 = 1.0 - tl.exp2(step.to(tl.float64) * log_beta1)
    bias2 = 1.0 - tl.exp2(step.to(tl.float64) * log_beta2)
    scalar_ptr += rows
    decay = (1.0 - lr * weight_decay).to(tl.float32)
    tl.store(scalar_ptr + stride * SCALAR_CLIP, clip.to(tl.float32), mask=mask)
    tl.store(scalar_ptr + stride * SCALAR_DECAY, decay, mask=mask)
    tl.store(scalar_ptr + stride * SCALAR_STEP_SIZE, (lr / bias1).to(tl.float32), mask=mask)
    tl.store(scalar_ptr + stride * SCALAR_ROOT_BIAS2, tl.sqrt(bias2).to(tl.float32), mask=mask)
    tl.store(scalar_ptr + stride * SCALAR_STEP, step, mask=mask)


@triton.jit
def _update(
    addresses, start, remaining, table_ptr, scalar_ptr, stride, clip, scalars, numbers, seed,
    PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr,
    MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, FROM_GRAD: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Update BLOCK elements from `start`; if MASKED, only the first `remaining` of them."""
    param, grad, exp_avg, exp_avg_sq = addresses
    decay, step_size, root_bias2 = scalars
    lerp, beta2, one_minus_beta2, eps = numbers
    elements = tl.arange(0, BLOCK)
    mask = elements < remaining
    param_ptr = pointer_to(param, PARAM, ALIGNED) + start + elements
    grad_ptr = pointer_to(grad, GRAD, ALIGNED) + start + elements
    exp_avg_ptr = pointer_to(exp_avg, EXP_AVG, ALIGNED) + start + elements
    exp_avg_sq_ptr = pointer_to(exp_avg_sq, EXP_AVG_SQ, ALIGNED) + start + elements
    p = load(param_ptr, mask, PARAM, MASKED)
    if MASTER:
        master = tl.load(table_ptr + stride * COLUMN_MASTER)
        master_ptr = pointer_to(master, tl.float32, ALIGNED) + start + elements
        p = follow(load(master_ptr, mask, tl.float32, MASKED), p, PARAM)
    g = load(grad_ptr, mask, GRAD, MASKED) * clip
    m = load(exp_avg_ptr, mask, EXP_AVG, MASKED)
    v = load(exp_avg_sq_ptr, mask, EXP_AVG_SQ, MASKED)
    # As torch.lerp: from the nearer end, fused.
    m = tl.fma(tl.full([BLOCK], lerp, tl.float32), g - m, g if FROM_GRAD else m)
    v = v * beta2 + g * one_minus_beta2 * g
    denominator = tl.div_rn(tl.sqrt_rn(v), root_bias2) + eps
    p = p * decay - step_size * tl.div_rn(m, denominator)
    store(exp_avg_ptr, m, mask, EXP_AVG, MASKED)
    store(exp_avg_sq_ptr, v, mask, EXP_AVG_SQ, MASKED)
    if MASTER:
        store(master_ptr, p, mask, tl.float32, MASKED)
    if STOCHASTIC:
        # A counter serves eight elements, a word two; start is a multiple of eight.
        counter = (start >> 3) + tl.arange(0, BLOCK // 8)
        param_id = tl.load(table_ptr + stride * COLUMN_PARAM_ID)
        step = tl.load(scalar_ptr + stride * SCALAR_STEP).to(tl.int64)
        domain = tl.full([1], PHILOX_DOMAIN, tl.uint32)
        w0, w1, w2, w3 = philox(counter, param_id, step, domain, seed)
        bits = bf16_bits(p, halves_in_order(w0, w1, w2, w3))
        store(param_ptr, bits, mask, tl.uint16, MASKED)
    else:
        store(param_ptr, p, mask, PARAM, MASKED)


@triton.jit(do_not_specialize=["stride", "begin", "n_rows", "seed"])
def adamw_kernel(
    table_ptr,  # int64 (columns of StepRow, stride)
    scalar_ptr,  # fp32 (N_SCALARS, stride)
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
    row = begin + row_of(table_ptr + stride * COLUMN_FIRST_PROGRAM + begin, n_rows, SEARCH)
    table_ptr += row
    scalar_ptr += row
    # int64, as the table: a tensor may have more than 2^31 elements.
    start = (tl.program_id(0) - tl.load(table_ptr + stride * COLUMN_FIRST_PROGRAM)) * BLOCK
    remaining = tl.load(table_ptr + stride * COLUMN_NUMEL) - start
    clip = tl.load(scalar_ptr + stride * SCALAR_CLIP)
    scalars = (
        tl.load(scalar_ptr + stride * SCALAR_DECAY),
        tl.load(scalar_ptr + stride * SCALAR_STEP_SIZE),
        tl.load(scalar_ptr + stride * SCALAR_ROOT_BIAS2),
    )
    # Ahead of the branch: the tensors' own loads then wait once for all of these.
    addresses = (
        tl.load(table_ptr + stride * COLUMN_PARAM),
        tl.load(table_ptr + stride * COLUMN_GRAD),
        tl.load(table_ptr + stride * COLUMN_EXP_AVG),
        tl.load(table_ptr + stride * COLUMN_EXP_AVG_SQ),
    )
    numbers = (lerp, beta2, one_minus_beta2, eps)
    whole = (remaining >= BLOCK) & (clip == clip)
    part = (remaining < BLOCK) & (clip == clip)
    # A mask that may end anywhere prevents wide loads: only a tensor's last block has one.
    if whole:
        _update(
            addresses, start, remaining, table_ptr, scalar_ptr, stride, clip, scalars, numbers,
            seed, PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MASTER, STOCHASTIC, FROM_GRAD, ALIGNED,
            BLOCK, False,
        )  # fmt: skip
    if part:
        _update(
            addresses, start, remaining, table_ptr, scalar_ptr, stride, clip, scalars, numbers,
            seed, PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MASTER, STOCHASTIC, FROM_GRAD, ALIGNED,
            BLOCK, True,
        )  # fmt: skip


def grad_norm(grads: list[Tensor], layout: object = None) -> Tensor:
    """Return the 2-norm over all gradients together, 0-d fp32; layout: as in `adamw`."""
    plan = norm_plan(grads, CHUNK, layout)
    if plan is None:
        return reference.grad_norm(grads)
    device = grads[0].device
    table_ptr = plan.table_on(device)
    partials = torch.empty(plan.n_programs, dtype=torch.float64, device=device)
    norm = torch.empty((), dtype=torch.float32, device=device)
    warps = NORM_CONFIGS[target.arch()]
    for (dtype, _), begin, n_rows, programs in plan.launches:
        if programs:
            launch(
                grad_norm_kernel,
                (programs,),
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
    launch(
        grad_norm_sum_kernel,
        (1,),
        partials,
        norm,
        plan.n_programs,
        LANES=LANES,
        num_warps=2 * warps,
    )
    return norm


@functools.lru_cache(maxsize=256)
def _two_floats(x: float) -> tuple[float, float]:
    """Return x rounded to fp32, and the rest of x rounded to fp32."""
    high = ctypes.c_float(x).value
    return high, ctypes.c_float(x - high).value if math.isfinite(high) else 0.0


def _read_on_device(lr: Tensor, device: torch.device) -> bool:
    """Return whether the kernels can read lr."""
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
    layout: object = None,
) -> None:
    """Take one step in place. masters: empty, or one fp32 tensor per parameter.

    layout: an object that comes only with tensors of the classes, dtypes, devices, sizes and
    strides with which it came before; None: nothing is known.
    """
    columns = [params, grads, exp_avgs, exp_avg_sqs, *([masters] if masters else []), steps]
    block, warps = STEP_CONFIGS[target.arch()]
    plan = step_plan(columns, param_ids, stochastic, block, layout)
    if plan is None:
        return reference.adamw(
            params, grads, exp_avgs, exp_avg_sqs, masters, steps, lr, grad_norm, max_norm, beta1,
            beta2, eps, weight_decay, param_ids, stochastic, seed,
        )  # fmt: skip
    device = params[0].device
    table_ptr = plan.table_on(device)
    scalars = torch.empty(N_SCALARS, plan.n_rows, dtype=torch.float32, device=device)
    resident = _read_on_device(lr, device)
    launch(
        adamw_steps_kernel,
        (triton.cdiv(plan.n_rows, SEARCH),),
        table_ptr,
        scalars,
        lr if resident else None,
        grad_norm,
        plan.n_rows,
        *_two_floats(0.0 if resident else float(lr)),
        *_two_floats(weight_decay),
        # log2(0) is not a number: with the smallest double instead, 1 - beta^step is still 1.
        *_two_floats(math.log2(beta1 or sys.float_info.min)),
        *_two_floats(math.log2(beta2 or sys.float_info.min)),
        _two_floats(max_norm)[0],
        LANES=SEARCH,
        num_warps=4,
    )
    # torch.lerp interpolates from the nearer end.
    weight = _two_floats(1 - beta1)[0]
    from_grad = weight >= 0.5
    numbers = (weight - 1 if from_grad else weight, beta2, 1 - beta2, eps)
    for (*dtypes, aligned), begin, n_rows, programs in plan.launches:
        if programs:
            launch(
                adamw_kernel,
                (programs,),
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
                # So each operation rounds as in the reference; the kernel waits for memory anyway.
                enable_fp_fusion=False,
            )
    plan.copy_back(columns[:-1])
