"""Measure what gptfast gains in an existing script and in an existing model.

The script is examples/plain.py with the replacements of docs/drop_in.md, one by one and all
together; the model is transformers' GPT2LMHeadModel after `accelerate`. FLOPs are counted as in
bench_train.py. Both sides start from the same weights and see the same batches; the losses of the
first two steps must agree.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from bench_train import flops, transformers_step
from harness import Case, Pair, both_sides

from gptfast import GPT, GPTConfig

SCRIPT = Path(__file__).parents[1] / "examples" / "plain.py"
_LOSS = "F.cross_entropy(self.lm_head(x).flatten(0, 1), target.flatten())"
_OPTIMIZER = "torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)"
REPLACEMENTS = {
    "attention": (
        "F.scaled_dot_product_attention(q, k, v, is_causal=True)",
        "ops.attention(q, k, v)",
    ),
    "cross_entropy": (_LOSS, f"ops{_LOSS.removeprefix('F')}"),
    "linear_cross_entropy": (_LOSS, "ops.linear_cross_entropy(x, self.lm_head.weight, target)"),
    "AdamW": (_OPTIMIZER, "gptfast.AdamW(model.parameters(), lr=1e-3)"),
    "max_norm": (
        "gptfast.AdamW(model.parameters(), lr=1e-3)",
        "gptfast.AdamW(model.parameters(), lr=1e-3, max_norm=1.0)",
    ),
}
_CLIPPING = "        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n"
ALL = ("attention", "linear_cross_entropy", "AdamW", "max_norm")

Train = Callable[..., Iterator[float]]


def script(names: Sequence[str]) -> Train:
    """Return `train` of examples/plain.py with these replacements made."""
    source = "import gptfast\nfrom gptfast import ops\n" + SCRIPT.read_text("utf-8")
    for name in names:
        before, after = REPLACEMENTS[name]
        if source.count(before) != 1:
            raise ValueError(
                f"examples/plain.py contains {before!r} {source.count(before)} times, not once"
            )
        source = source.replace(before, after)
        if name == "max_norm":
            source = source.replace(_CLIPPING, "")
    namespace = {"__name__": "plain"}
    exec(compile(source, str(SCRIPT), "exec"), namespace)
    return namespace["train"]


def _script_pair(names: Sequence[str], sizes: dict[str, int]) -> Callable[[], Pair]:
    def build() -> Pair:
        ours, peer = (script(x)(steps=10**6, **sizes) for x in (names, ()))

        def check() -> None:
            for _ in range(2):
                a, b = next(ours), next(peer)
                if abs(a - b) > 1e-4:
                    raise AssertionError(f"the losses differ: {a}, {b}")

        return Pair(lambda: next(ours), lambda: next(peer), check)

    return build


def _transformers_pair(config: GPTConfig, B: int, T: int) -> Callable[[], Pair]:
    def build() -> Pair:
        torch.manual_seed(0)
        idx, target = torch.randint(config.vocab_size, (2, B, T))
        target[:, -1] = -100  # the labels cannot name the token after the last one
        model = GPT(config)
        ours = transformers_step(model, idx, target, accelerated=True)
        peer = transformers_step(model, idx, target)

        def check() -> None:
            for _ in range(2):
                torch.testing.assert_close(ours(), peer(), rtol=0, atol=1e-4)

        return Pair(ours, peer, check)

    return build


def cases(quick: bool) -> Iterator[Case]:
    """Yield the cases of GPT-2 124M, or of 4 layers of width 256; V = 50257 in both."""
    config, name, B, T = GPTConfig(), "GPT-2 124M", 4, 256
    if quick:
        config, name = GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=256), "4 layers of 256"
    sizes = {n: getattr(config, n) for n in ("n_layer", "n_head", "n_embd", "vocab_size")}
    sizes |= {"batch_size": B, "block_size": T}
    count = flops(config, B, T)
    for names in (*[(n,) for n in ALL[:-1]], ("cross_entropy",), ALL):
        label = f"script {name}: {'all' if names == ALL else names[0]}"
        build = _script_pair(names, sizes)
        yield Case("drop_in", label, f"B={B} T={T}", "examples/plain.py", build, flops=count)
    for shape in [(B, T)] if quick else [(B, T), (2, 1024)]:
        build, count = _transformers_pair(config, *shape), flops(config, *shape)
        label = f"accelerate(model), AdamW, {name}"
        shape_name = "B={} T={}".format(*shape)
        yield Case("drop_in", label, shape_name, "transformers", build, flops=count)


@pytest.mark.parametrize(("case", "side"), both_sides(cases(quick=False)))
def test_drop_in(benchmark, case: Case, side: str) -> None:  # type: ignore[no-untyped-def]
    pair = case.build()
    pair.check()
    benchmark.pedantic(getattr(pair, side), rounds=3, iterations=1, warmup_rounds=1)
