"""The targets that depend on the CPU's instructions, and what each CPU reached of them.

A target is a ratio, peer / gptfast, that a row of the records has to reach on the CPUs that have
the instructions for it. The other targets stand in `bench_*.py`, beside their cases.
"""

from dataclasses import dataclass

from record import Row

Key = tuple[str, str, str, str]
"""op, case, shape and peer of a row; they are the same on every CPU."""

ANY, AMX, AVX512_BF16 = "any", "AMX", "AVX512-BF16, no AMX"
LEVELS = {AMX: ("amx",), AVX512_BF16: ("avx512_bf16",)}
"""The instruction-set levels of gptfast that have what a target needs."""


@dataclass(frozen=True)
class Target:
    """A ratio to reach on the CPUs that have what it needs."""

    what: str
    against: str
    ratio: float
    needs: str
    key: Key


def _step(kind: str, shape: str, peer: str, ratio: float, needs: str = AMX) -> Target:
    key = ("train", f"step GPT-2 124M {kind}", shape, peer)
    return Target(f"training step, {kind}, {shape}", peer, ratio, needs, key)


def _attention(dtype: str, shape: str, ratio: float, needs: str) -> Target:
    what = f"attention, forward and backward, {dtype}, {shape}"
    key = ("attention", f"fwd+bwd {dtype}", shape, "SDPA")
    return Target(what, f"SDPA {dtype}", ratio, needs, key)


def _head(rows: int, peer: str) -> Target:
    key = ("linear_cross_entropy", "fwd+bwd bf16", f"({rows}, 768)x(50257, 768)", peer)
    return Target(f"linear_cross_entropy, bf16, {rows} rows", peer, 3.0, AMX, key)


def _prefill(precision: str, peer: str, ratio: float) -> Target:
    key = ("prefill", f"512 tokens {precision}", "GPT-2 124M", peer)
    return Target(f"prefill of 512 tokens, {precision}", peer, ratio, AMX, key)


def _decode(precision: str, rows: int, peer: str, ratio: float) -> Target:
    key = ("decode", f"128 tokens {precision}", f"GPT-2 124M B={rows}", peer)
    return Target(f"decoding {precision}, rows: {rows}", peer, ratio, ANY, key)


def _sampling(case: str, peer: str, ratio: float) -> Target:
    return Target(
        f"sampling one row, {case}", peer, ratio, ANY, ("sampling", case, "(1, 50257)", peer)
    )


def _adamw(moments: str) -> Target:
    peer = "AdamW(fused) on bf16 + clip_grad_norm_"
    case = f"step, max_norm bf16 stochastic, {moments} moments"
    what = f"AdamW, bf16 parameters, stochastic rounding, {moments} moments"
    return Target(what, peer, 1.0, ANY, ("adamw", case, "124M in 148 tensors", peer))


LONG, SHORT = "B=2 T=1024", "B=8 T=256"
PLAIN, COMPILED = "plain PyTorch", "plain PyTorch, torch.compile"
SHAPES = ("(4, 12, 1024, 64)", "(4, 12, 256, 64)", "(1, 12, 2048, 64)")

TARGETS = (
    _step("bf16", LONG, PLAIN, 3.0),
    _step("bf16", LONG, COMPILED, 2.5),
    _step("bf16", SHORT, PLAIN, 2.7),
    _step("bf16", SHORT, COMPILED, 2.2),
    _step("fp32 high", LONG, COMPILED, 2.2),
    _step("fp32", LONG, PLAIN, 1.6),
    _step("fp32", LONG, "transformers", 1.7),
    _step("bf16", LONG, "gptfast fp32", 1.5, AVX512_BF16),
    _step("bf16", LONG, COMPILED, 1.8, AVX512_BF16),
    *(_attention("bf16", *x, AMX) for x in zip(SHAPES, (4.0, 4.0, 3.0), strict=True)),
    *(_attention("fp32", *x, ANY) for x in zip(SHAPES, (1.8, 2.4, 1.6), strict=True)),
    *(
        _head(rows, peer)
        for rows in (2048, 4096)
        for peer in ("linear + cross_entropy", "F.linear_cross_entropy")
    ),
    _prefill("bf16", "llama.cpp BF16", 4.0),
    _prefill("int8", "llama.cpp Q8_0", 6.0),
    _prefill("bf16", "transformers bfloat16", 1.5),
    _prefill("int8", "CTranslate2 int8", 1.5),
    _decode("int8", 1, "llama.cpp Q8_0", 1.3),
    _decode("int8", 8, "llama.cpp Q8_0", 3.0),
    _decode("int4", 1, "gptfast int8", 1.5),
    _decode("int4", 1, "llama.cpp Q4_0", 1.2),
    _sampling("plain", "softmax+multinomial", 25.0),
    _sampling("top_p=0.9", "sort+softmax+multinomial", 50.0),
    _adamw("fp32"),
    _adamw("bf16"),
)


def cell(target: Target, row: Row | None, levels: set[str]) -> str:
    """Return what a CPU reached of a target; levels: gptfast's levels in the CPU's records."""
    if target.needs != ANY and not levels & {*LEVELS[target.needs]}:
        return "—"
    if row is None:
        return "not measured"
    met = "met" if row["ratio"] >= target.ratio else "missed"
    return f"**{row['ratio']:.2f}x**, {met}"
