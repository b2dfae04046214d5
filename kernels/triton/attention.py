"""Causal attention in tiles, forward and backward, as kernels/reference/attention.py defines it.

    S = Q K^T;  P = exp2(c S - max);  O = P V / sum P                    c = scale log2(e)
    P = exp2(c S - log2(e) lse);  delta = sum_d dO O;  dS = P (dP - delta)
    dQ = scale dS K;  dK = scale dS^T Q;  dV = P^T dO                    (FlashAttention-2)

Backward is two kernels: a program of the first owns the dQ of a block of queries, one of the second
the dK and dV of a block of keys. That computes S and dP twice, seven products for five; the five
alone would leave a partial dQ per block of keys, whose writing and reading cost as much at T = 1024
and more beyond. Scores are masked only in the blocks that need it, by a branch and not by a second
loop, in front of which the pipeline of loads would run dry.

Programs start with the longest rows, which evens out what the multiprocessors do without anything
having to divide (pairing long with short rows needs that). They come in groups of heads whose keys
and values fit the L2 cache together, and are read from memory once.
"""

import torch
import triton
import triton.language as tl
from gptfast.kernels.reference import attention as reference
from gptfast.kernels.triton.attention_decode import attention_decode
from gptfast.kernels.triton.attention_tiles import BWD_DK_DV, BWD_DQ, FWD, MAX_D, tile
from gptfast.kernels.triton.philox import in_order, philox, uniform
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# What the heads of one group may read again and again: a third of an H100's L2 cache.
GROUP_BYTES = 16 << 20

# In what follows a view is (pointer, stride of b, stride of h, stride of t) of (B, H, T, D), and
# dropout is None or (pointer to the seed, p, 1 / (1 - p)).


@triton.jit
def _program(n_blocks, n_heads, group):
    """The head and the block of this program: group by group of heads, block by block."""
    pid = tl.program_id(0)
    first = pid // (group * n_blocks) * group
    rest = pid - first * n_blocks
    size = tl.minimum(group, n_heads - first)
    return first + rest % size, rest // size


@triton.jit
def _rows(view, head, H, rows, BLOCK_D: tl.constexpr):
    """Pointers to (rows, BLOCK_D) of one head."""
    # int64: long sequences, packed ones above all, pass 2^31 elements.
    start = view[0] + (head // H).to(tl.int64) * view[1] + (head % H).to(tl.int64) * view[2]
    return start + rows.to(tl.int64)[:, None] * view[3] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _length(kv_len_ptr, head, H, Tk):
    """The length that aligns the queries, and how many keys there are."""
    if kv_len_ptr is None:
        return Tk, Tk
    else:
        length = tl.load(kv_len_ptr + head // H).to(tl.int32)
        return length, tl.minimum(length, Tk)


@triton.jit
def _key_range(first, length, n_keys, Tq, BLOCK_M: tl.constexpr):
    """The last key each query of a block sees, how many all of them see, how many any sees."""
    last = tl.minimum(length - Tq + first + tl.arange(0, BLOCK_M), n_keys - 1)
    full = tl.minimum(length - Tq + first + 1, n_keys)
    return last, full, tl.minimum(length - Tq + tl.minimum(first + BLOCK_M, Tq), n_keys)


@triton.jit
def _keep(dropout, head, position, key, BLOCK_N: tl.constexpr):
    """Whether dropout keeps the probabilities of the queries at `position`, keys from `key` on."""
    counters = (key // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    zeros = tl.zeros([position.shape[0], BLOCK_N // 4], tl.int32)
    seed = tl.load(dropout[0])
    words = philox(zeros + counters, zeros + position[:, None], zeros + head, zeros + 1, seed)
    return uniform(in_order(words[0], words[1], words[2], words[3])) >= dropout[1]


@triton.jit(do_not_specialize=["Tq", "Tk", "H", "n_heads", "group"])
def attention_fwd_kernel(
    q, k, v, out, lse_ptr, Tq, Tk, H, n_heads, group, D, c, dropout, kv_len_ptr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    NEGATIVE: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(Tq, BLOCK_M)
    head, block = _program(n_blocks, n_heads, group)
    first = (n_blocks - 1 - block) * BLOCK_M
    queries = first + tl.arange(0, BLOCK_M)
    length, n_keys = _length(kv_len_ptr, head, H, Tk)
    last, full, end = _key_range(first, length, n_keys, Tq, BLOCK_M)
    in_d = (tl.arange(0, BLOCK_D) < D)[None, :]
    q_mask = (queries < Tq)[:, None] & in_d
    q_tile = tl.load(_rows(q, head, H, queries, BLOCK_D), mask=q_mask, other=0.0)
    if NEGATIVE:
        q_tile = -q_tile
    k_ptrs = _rows(k, head, H, tl.arange(0, BLOCK_N), BLOCK_D)
    v_ptrs = _rows(v, head, H, tl.arange(0, BLOCK_N), BLOCK_D)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    for start in tl.range(0, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        row = tl.cast(start, tl.int64)
        mask = (keys < n_keys)[:, None] if EVEN_D else (keys < n_keys)[:, None] & in_d
        k_tile = tl.load(k_ptrs + row * k[3], mask=mask, other=0.0)
        v_tile = tl.load(v_ptrs + row * v[3], mask=mask, other=0.0)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        if start + BLOCK_N > full:
            s = tl.where(keys[None, :] <= last[:, None], s, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1) * c)
        # Of a query that has seen no key yet, -inf - -inf would be NaN.
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        p = tl.exp2(s * c - shift[:, None])
        rescale = tl.exp2(peak - shift)
        total = total * rescale + tl.sum(p, 1)
        if dropout is not None:
            p = tl.where(_keep(dropout, head, Tk - Tq + queries, start, BLOCK_N), p, 0.0)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision="ieee")
        peak = new_peak

    # A query that sees no key: out is 0, lse -inf.
    total = tl.where(total == 0.0, 1.0, total)
    scale = 1.0 / total if dropout is None else dropout[2] / total
    out_tile = (acc * scale[:, None]).to(q_tile.dtype)
    tl.store(_rows(out, head, H, queries, BLOCK_D), out_tile, mask=q_mask)
    lse_ptrs = lse_ptr + head.to(tl.int64) * Tq + queries
    tl.store(lse_ptrs, peak * LN2 + tl.log(total), mask=queries < Tq)


@triton.jit
def _dq_blocks(
    dq, total, delta, q_tile, dout_tile, k_ptrs, v_ptrs, k, v, lse, last, full, end, n_keys, D, c,
    dropout, head, position, BLOCK_N: tl.constexpr, EVEN_D: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Over the keys: add to total = sum P and delta = sum P dP if SUMS, else to dq = dS K."""
    in_d = (tl.arange(0, q_tile.shape[1]) < D)[None, :]
    for start in tl.range(0, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        row = tl.cast(start, tl.int64)
        mask = (keys < n_keys)[:, None] if EVEN_D else (keys < n_keys)[:, None] & in_d
        k_tile = tl.load(k_ptrs + row * k[3], mask=mask, other=0.0)
        v_tile = tl.load(v_ptrs + row * v[3], mask=mask, other=0.0)
        if q_tile.dtype == tl.float32:
            # The products of the other kernel, to the bit; and these shapes need fewer registers.
            s = tl.trans(tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee"))
            dp = tl.trans(tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee"))
        else:
            s = tl.dot(q_tile, tl.trans(k_tile))
            dp = tl.dot(dout_tile, tl.trans(v_tile))
        p = tl.exp2(s * c - lse[:, None])
        if start + BLOCK_N > full:
            p = tl.where(keys[None, :] <= last[:, None], p, 0.0)
        if dropout is not None:
            dp = tl.where(_keep(dropout, head, position, start, BLOCK_N), dp * dropout[2], 0.0)
        if SUMS:
            total += tl.sum(p, 1)
            delta += tl.sum(p * dp, 1)
        else:
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    return dq, total, delta


@triton.jit(do_not_specialize=["Tq", "Tk", "H", "n_heads", "group"])
def attention_bwd_dq_kernel(
    dout, q, k, v, out, lse_ptr, dq, delta_ptr, total_ptr, Tq, Tk, H, n_heads, group, D, scale,
    dropout, kv_len_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(Tq, BLOCK_M)
    head, block = _program(n_blocks, n_heads, group)
    first = (n_blocks - 1 - block) * BLOCK_M
    queries = first + tl.arange(0, BLOCK_M)
    length, n_keys = _length(kv_len_ptr, head, H, Tk)
    last, full, end = _key_range(first, length, n_keys, Tq, BLOCK_M)
    in_d = (tl.arange(0, BLOCK_D) < D)[None, :]
    q_mask = (queries < Tq)[:, None] & in_d
    q_tile = tl.load(_rows(q, head, H, queries, BLOCK_D), mask=q_mask, other=0.0)
    dout_tile = tl.load(_rows(dout, head, H, queries, BLOCK_D), mask=q_mask, other=0.0)
    rows = head.to(tl.int64) * Tq + queries
    lse = tl.load(lse_ptr + rows, mask=queries < Tq, other=0.0) * LOG2E
    k_ptrs = _rows(k, head, H, tl.arange(0, BLOCK_N), BLOCK_D)
    v_ptrs = _rows(v, head, H, tl.arange(0, BLOCK_N), BLOCK_D)
    c = scale * LOG2E

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    delta = tl.zeros([BLOCK_M], tl.float32)
    if total_ptr is None:
        out_tile = tl.load(_rows(out, head, H, queries, BLOCK_D), mask=q_mask, other=0.0)
        delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    else:
        # lse rounded to fp32 is off by |lse| * 6e-8, and every P of the query with it: up to 8
        # times the error of PyTorch's own gradients. So the sums of P and P dP are taken anew.
        acc, total, delta = _dq_blocks(
            acc, total, delta, q_tile, dout_tile, k_ptrs, v_ptrs, k, v, lse, last, full, end,
            n_keys, D, c, dropout, head, Tk - Tq + queries, BLOCK_N, EVEN_D, True,
        )  # fmt: skip
        total = tl.where(total == 0.0, 1.0, total)
        delta /= total
        tl.store(total_ptr + rows, total, mask=queries < Tq)
    tl.store(delta_ptr + rows, delta, mask=queries < Tq)

    # A query that sees one key has dS = 0, to the bit, so P may be 0 here. dP - delta would be the
    # difference of two roundings.
    lse = tl.where(last > 0, lse, float("inf"))
    acc, _, _ = _dq_blocks(
        acc, total, delta, q_tile, dout_tile, k_ptrs, v_ptrs, k, v, lse, last, full, end,
        n_keys, D, c, dropout, head, Tk - Tq + queries, BLOCK_N, EVEN_D, False,
    )  # fmt: skip
    if total_ptr is not None:
        acc /= total[:, None]
    dq_tile = (acc * scale).to(q_tile.dtype)
    tl.store(_rows(dq, head, H, queries, BLOCK_D), dq_tile, mask=q_mask)


@triton.jit(do_not_specialize=["Tq", "Tk", "H", "n_heads", "group"])
def attention_bwd_dk_dv_kernel(
    dout, q, k, v, lse_ptr, delta_ptr, total_ptr, dk, dv, Tq, Tk, H, n_heads, group, D, scale,
    dropout, kv_len_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
):  # fmt: skip
    head, block = _program(tl.cdiv(Tk, BLOCK_N), n_heads, group)
    key = block * BLOCK_N
    keys = key + tl.arange(0, BLOCK_N)
    length, n_keys = _length(kv_len_ptr, head, H, Tk)
    in_d = (tl.arange(0, BLOCK_D) < D)[None, :]
    k_mask = (keys < n_keys)[:, None] & in_d
    k_tile = tl.load(_rows(k, head, H, keys, BLOCK_D), mask=k_mask, other=0.0)
    v_tile = tl.load(_rows(v, head, H, keys, BLOCK_D), mask=k_mask, other=0.0)
    # Queries before `first` see none of the keys, those from `full` on all that are there.
    first = tl.maximum(key - (length - Tq), 0) // BLOCK_M * BLOCK_M
    first = tl.where(key < n_keys, first, Tq)
    full = tl.minimum(key + BLOCK_N, n_keys) - 1 - (length - Tq)
    q_ptrs = _rows(q, head, H, tl.arange(0, BLOCK_M), BLOCK_D)
    dout_ptrs = _rows(dout, head, H, tl.arange(0, BLOCK_M), BLOCK_D)
    lse_ptr += head.to(tl.int64) * Tq
    delta_ptr += head.to(tl.int64) * Tq
    if total_ptr is not None:
        total_ptr += head.to(tl.int64) * Tq
    c = scale * LOG2E

    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in tl.range(first, Tq, BLOCK_M):
        queries = start + tl.arange(0, BLOCK_M)
        row = tl.cast(start, tl.int64)
        mask = (queries < Tq)[:, None] if EVEN_D else (queries < Tq)[:, None] & in_d
        q_tile = tl.load(q_ptrs + row * q[3], mask=mask, other=0.0)
        dout_tile = tl.load(dout_ptrs + row * dout[3], mask=mask, other=0.0)
        # Of a query past the last, P = exp2(-inf).
        lse = tl.load(lse_ptr + queries, mask=queries < Tq, other=float("inf")) * LOG2E
        delta = tl.load(delta_ptr + queries, mask=queries < Tq, other=0.0)
        # (keys, queries), as is all below, so that P and dS need not pass through shared memory.
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
        dp = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee")
        p = tl.exp2(s * c - lse[None, :])
        last = tl.minimum(length - Tq + queries, n_keys - 1)
        if start < full:
            p = tl.where(keys[:, None] <= last[None, :], p, 0.0)
        if total_ptr is not None:
            p /= tl.load(total_ptr + queries, mask=queries < Tq, other=1.0)[None, :]
        kept = p
        if dropout is not None:
            keep = tl.trans(_keep(dropout, head, Tk - Tq + queries, key, BLOCK_N))
            kept = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * dropout[2], 0.0)
        dv_acc = tl.dot(kept.to(dout_tile.dtype), dout_tile, dv_acc, input_precision="ieee")
        ds = p * (dp - delta[None, :])
        if start == first:
            # Queries that see one key: dS is 0 to the bit, as above.
            ds = tl.where(last[None, :] > 0, ds, 0.0)
        dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")

    k_mask = (keys < Tk)[:, None] & in_d
    seen = (keys < n_keys)[:, None]
    dv_scale = 1.0 if dropout is None else dropout[2]
    dk_tile = tl.where(seen, dk_acc * scale, 0.0).to(k_tile.dtype)
    dv_tile = tl.where(seen, dv_acc * dv_scale, 0.0).to(v_tile.dtype)
    tl.store(_rows(dk, head, H, keys, BLOCK_D), dk_tile, mask=k_mask)
    tl.store(_rows(dv, head, H, keys, BLOCK_D), dv_tile, mask=k_mask)


def _view(x: Tensor) -> tuple[Tensor, int, int, int]:
    """A (B, H, T, D) tensor as kernels take it, copied if its last dimension is not contiguous."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, *x.stride()[:3]


def _group(k: Tensor) -> int:
    """How many heads' keys and values, or queries and gradients, share the L2 cache."""
    return max(1, GROUP_BYTES // max(1, 2 * k.shape[2] * k.shape[3] * k.element_size()))


def _dropout(dropout_p: float, seed: Tensor | None) -> tuple[Tensor, float, float] | None:
    return (seed, dropout_p, 1.0 / (1.0 - dropout_p)) if dropout_p > 0 else None


def _fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    kv_len: Tensor | None,
) -> None:
    """Fill out (B, H, Tq, D) and lse (B, H, Tq)."""
    B, H, Tq, D = q.shape
    Tk = k.shape[2]
    if Tq == 1 and dropout_p == 0:
        attention_decode(_view(q), _view(k), _view(v), _view(out), lse, scale, kv_len)
        return
    blocks, options = tile(FWD, q.dtype, D, dropout_p > 0)
    # exp2(c S - max) takes c > 0: the sign is q's, and 2^-120 makes every P 1 but -inf's.
    c = max(abs(scale) * LOG2E.value, 2.0**-120)
    attention_fwd_kernel[(triton.cdiv(Tq, blocks["BLOCK_M"]) * B * H,)](
        _view(q),
        _view(k),
        _view(v),
        _view(out),
        lse,
        Tq,
        Tk,
        H,
        B * H,
        _group(k),
        D,
        c,
        _dropout(dropout_p, seed),
        kv_len,
        **blocks,
        NEGATIVE=scale < 0,
        **options,
    )


def _bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    kv_len: Tensor | None,
) -> None:
    """Fill grads: dq (B, H, Tq, D), dk and dv (B, H, Tk, D)."""
    B, H, Tq, D = q.shape
    Tk = k.shape[2]
    dout_view, q_view, k_view, v_view = (_view(x) for x in (dout, q, k, v))
    dq, dk, dv = (_view(x) for x in grads)
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    total = torch.empty_like(lse) if q.dtype == torch.float32 else None
    common = (Tq, Tk, H, B * H, _group(k), D, scale, _dropout(dropout_p, seed), kv_len)
    blocks, options = tile(BWD_DQ, q.dtype, D, dropout_p > 0)
    attention_bwd_dq_kernel[(triton.cdiv(Tq, blocks["BLOCK_M"]) * B * H,)](
        dout_view, q_view, k_view, v_view, _view(out), lse, dq, delta, total, *common,
        **blocks, **options,
    )  # fmt: skip
    blocks, options = tile(BWD_DK_DV, q.dtype, D, dropout_p > 0)
    attention_bwd_dk_dv_kernel[(triton.cdiv(Tk, blocks["BLOCK_N"]) * B * H,)](
        dout_view, q_view, k_view, v_view, lse, delta, total, dk, dv, *common, **blocks, **options
    )


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    kv_len: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out (B, H, Tq, D) in q's dtype, lse (B, H, Tq) natural log, fp32."""
    if q.shape[3] > MAX_D:
        return reference.attention_fwd(q, k, v, scale, dropout_p, seed, kv_len)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    _fwd(q, k, v, out, lse, scale, dropout_p, seed, kv_len)
    return out, lse


def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    kv_len: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous, in the inputs' dtype."""
    options = (scale, dropout_p, seed, kv_len)
    if q.shape[3] > MAX_D:
        return reference.attention_bwd(dout, q, k, v, out, lse, *options)
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    _bwd(dout, q, k, v, out, lse, grads, *options)
    return grads


def _heads(x: Tensor, n_head: int) -> Tensor:
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)


def _unpack(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (_heads(x, n_head) for x in qkv.chunk(3, -1))
    return q, k, v


def attention_qkv_fwd(
    qkv: Tensor,
    n_head: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    kv_len: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """qkv (B, T, 3C) -> out (B, T, C), lse (B, H, T); nothing is copied, whatever T's stride is."""
    B, T, C3 = qkv.shape
    if C3 // (3 * n_head) > MAX_D:
        return reference.attention_qkv_fwd(qkv, n_head, scale, dropout_p, seed, kv_len)
    out = qkv.new_empty(B, T, C3 // 3)
    lse = qkv.new_empty(B, n_head, T, dtype=torch.float32)
    heads = _unpack(qkv, n_head)
    _fwd(*heads, _heads(out, n_head), lse, scale, dropout_p, seed, kv_len)
    return out, lse


def attention_qkv_bwd(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    n_head: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    kv_len: Tensor | None,
) -> Tensor:
    """dqkv (B, T, 3C)."""
    options = (scale, dropout_p, seed, kv_len)
    if qkv.shape[2] // (3 * n_head) > MAX_D:
        return reference.attention_qkv_bwd(dout, qkv, out, lse, n_head, *options)
    dqkv = qkv.new_empty(qkv.shape)
    heads = _unpack(qkv, n_head)
    dout, out = _heads(dout, n_head), _heads(out, n_head)
    _bwd(dout, *heads, out, lse, _unpack(dqkv, n_head), *options)
    return dqkv
