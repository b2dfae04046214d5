"""Predict the training step of GPT-2 on 8 to 4,096 GPUs under DDP, FSDP2 and HSDP: no measurement.

python bench/scaling.py [--gpu h100] [--batch 4096] [--network GB/s] [--draw PNG]

The model of a step is in step_model.py, that of the links in cluster.py. `check` compares it with
published runs. The predictions are those of a program as fast as llm.c; nothing was measured.
"""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cluster import A100, A100_40GB, GPU, GPUS, H100
from step_model import (
    COMPILED,
    EAGER,
    FUSED,
    LAYOUTS,
    Prediction,
    Software,
    T,
    Work,
    micro_batch,
    predict,
    recommended,
)

from gptfast.config import PRESETS, GPTConfig

SIZES = tuple(2**i for i in range(3, 13))
"""The numbers of GPUs."""
BATCH_ROWS = 4096
"""Rows of a step, of all GPUs together: 4.2 million tokens."""


def all_of(config: GPTConfig, gpu: GPU, n: int, rows: int) -> dict[str, Prediction]:
    """Return the predictions of the layouts that can be run."""
    out = {}
    for layout in LAYOUTS:
        work = Work(config, gpu, n, layout, rows)
        if rows % n == 0 and rows >= n and micro_batch(work):
            out[layout] = predict(work)
    return out


@dataclass(frozen=True)
class Published:
    """A run that somebody published: seconds of its step. fitted: the model was fitted to it."""

    name: str
    source: str
    work: Work
    seconds: float
    fitted: bool = False


def _config(preset: str, vocab_size: int = 50304) -> GPTConfig:
    return GPTConfig(vocab_size=vocab_size, **PRESETS[preset])


def _llm_c(preset: str, gpu: GPU, rows: int, micro: int) -> Work:
    # Its ZeRO-1 moves as many bytes as an all-reduce.
    return Work(_config(preset), gpu, 8, "ddp", rows, micro)


def _nanogpt(software: Software) -> Work:
    return Work(_config("gpt2", 50257), A100_40GB, 8, "ddp", 64, 8, software=software)


_XL = Work(_config("gpt2-xl"), A100, 8, "ddp", 512, 2, software=FUSED)
_SCRIPTS, _README = "llm.c, scripts/run_gpt2_{}.sh", "nanoGPT, README of 2022-12-30"
PUBLISHED = (
    Published(
        "llm.c 350M, 8 A100",
        _SCRIPTS.format("350M"),
        _llm_c("gpt2-medium", A100, 512, 64),
        0.82,
        True,
    ),
    Published(
        "llm.c 774M, 8 A100",
        _SCRIPTS.format("774M"),
        _llm_c("gpt2-large", A100, 512, 32),
        1.7,
        True,
    ),
    Published(
        "llm.c 1558M, 8 H100",
        _SCRIPTS.format("1558M"),
        _llm_c("gpt2-xl", H100, 1024, 16),
        2.8,
        True,
    ),
    Published(
        "llm.c 124M, 8 A100: 1.75M tokens/s",
        _SCRIPTS.format("124M"),
        _llm_c("gpt2", A100, 512, 64),
        512 * 1024 / 1.75e6,
    ),
    Published(
        "llm.c 124M, 8 H100",
        "modded-nanogpt, README: all steps in 45 minutes",
        _llm_c("gpt2", H100, 512, 64),
        0.140,
    ),
    Published("nanoGPT 124M, eager, 8 A100", _README, _nanogpt(EAGER), 0.250),
    Published("nanoGPT 124M, torch.compile, 8 A100", _README, _nanogpt(COMPILED), 0.135),
    Published("PyTorch 1558M, torch.compile, 8 A100", "llm.c, pull request 469", _XL, 5.267, True),
)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def error(run: Published) -> float:
    """Return the prediction's relative error."""
    return predict(run.work).seconds / run.seconds - 1


def check() -> str:
    """Return the table of published runs and of what is predicted for them."""
    head = "published run", "source", "a step", "predicted", "error"
    rows = (
        (
            run.name,
            run.source,
            f"{run.seconds * 1e3:,.0f} ms",
            f"{predict(run.work).seconds * 1e3:,.0f} ms",
            f"{error(run):+.0%}" + (" (fitted)" if run.fitted else ""),
        )
        for run in PUBLISHED
    )
    return _table(head, rows)


def _rows_of(gpu: GPU, rows: int) -> Iterator[tuple[str, ...]]:
    for preset in PRESETS:
        for n in SIZES:
            found = all_of(_config(preset), gpu, n, rows)
            if not found:
                continue
            best = recommended(found)
            alone = found[best].seconds - found[best].exposed
            times = [
                f"{found[x].seconds * 1e3:,.1f} ms" if x in found else "does not fit"
                for x in LAYOUTS
            ]
            yield (
                preset,
                f"{n:,}",
                *times,
                f"{found[best].tokens_per_s / 1e6:,.1f}M",
                f"{alone / found[best].seconds:.0%}",
                f"{best}, {found[best].micro} rows at once",
            )


def layouts(gpu: GPU, rows: int, sizes: tuple[int, ...] = SIZES) -> str:
    """Return the table of predicted steps, with the layout that is recommended."""
    head = "model", "GPUs", *LAYOUTS, "tokens/s", "computing", "recommended"
    kept = {f"{n:,}" for n in sizes}
    return _table(head, (row for row in _rows_of(gpu, rows) if row[1] in kept))


def page() -> str:
    """Return what docs/distributed.md shows: the check, and some of the predictions."""
    return f"{check()}\n\n{layouts(H100, BATCH_ROWS, (8, 64, 512, 4096))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100")
    parser.add_argument("--batch", type=int, default=BATCH_ROWS, help="rows of 1,024 tokens a step")
    parser.add_argument("--network", type=float, help="GB/s of a node's network")
    parser.add_argument("--draw", type=Path, metavar="PNG", help="write the figure")
    args = parser.parse_args()
    gpu = GPUS[args.gpu]
    if args.network:
        gpu = replace(gpu, network=args.network * 1e9)
    print("Every number below but those of the published runs is a prediction.\n")
    print(check())
    print(f"\n{gpu.name}, {args.batch} rows of {T} tokens a step (prediction):\n")
    print(layouts(gpu, args.batch))
    if args.draw:
        from picture import scaling

        curves = {
            preset: {n: all_of(_config(preset), gpu, n, args.batch) for n in SIZES}
            for preset in PRESETS
        }
        scaling(curves, f"{gpu.name}, {args.batch:,} rows of {T:,} tokens a step").savefig(
            args.draw, dpi=110
        )


if __name__ == "__main__":
    main()
