"""The training step on a GPU: whether its forms give the same numbers, and its profile."""

from pathlib import Path

import torch
from gpu_device import DEVICE, SMOKE, on_device, synchronize
from gpu_jobs import Emit, slug
from gpu_train import COMPILED, EAGER, LR, REPLAYED, Steps, command_step, is_replayed

from gptfast import GPT, GPTConfig

STEPS = 3 if SMOKE else 5
"""More than the two after which a graph is captured."""
PROFILED_ROWS = 40
SIDES = {"eager": EAGER, "replayed": REPLAYED, "compiled": COMPILED}


def _losses(form: str, reasons: list[str]) -> tuple[list[float], bool]:
    """Return the losses of a few of the command's steps of a small GPT, and whether it has a graph.

    reasons take why there is none.
    """
    torch.manual_seed(0)
    T = 8 if SMOKE else 256
    config = GPTConfig(vocab_size=50257, block_size=T, n_layer=2, n_head=2, n_embd=128)
    if SMOKE:
        config = GPTConfig(vocab_size=101, block_size=T, n_layer=1, n_head=2, n_embd=32)
    with on_device():
        model = GPT(config)
        idx, target = torch.randint(config.vocab_size, (2, 2, T))  # (B, T) each
    step = command_step(model, SIDES[form], SMOKE, torch.device(DEVICE), reasons.append)
    return [step.run([(idx, target)], LR)["loss"] for _ in range(STEPS)], is_replayed(step)


def check_step(form: str, emit: Emit) -> None:
    """Compare steps of a form with eager ones; but for compiled ones, bits must agree."""
    reasons = list[str]()
    eager, _ = _losses("eager", reasons)
    emit({"eager": eager})
    losses, replayed = _losses(form, reasons)
    largest = max(abs(a - b) for a, b in zip(losses, eager, strict=True))
    found = {"eager": eager, f"{form}, second run": losses, "largest_difference": largest}
    emit({**found, "replayed": replayed, "reasons": reasons})
    assert replayed or form != "replayed" or DEVICE == "cpu", f"no CUDA graph: {reasons}"
    # A compiler may round sums of 16 bits otherwise.
    assert not largest or form == "compiled", f"{form} steps differ from eager ones: {largest:.3g}"


def _annotates(event: object) -> bool:
    """Return whether an event of the profiler is a name that was given to a span of time."""
    return bool(getattr(event, "is_user_annotation", False))


def profile_step(form: str, side: str, out: Path, emit: Emit) -> None:
    """Profile a step of `gptfast train --precision bf16`, B=16 and T=1024; the table is a file."""
    from torch.profiler import ProfilerActivity, profile

    with on_device():
        step = Steps(16, SMOKE).make(side)
    for _ in range(0 if SMOKE else 4):
        step()
    synchronize()
    activities = [ProfilerActivity.CPU] + ([] if SMOKE else [ProfilerActivity.CUDA])
    with profile(activities=activities) as profiler:
        step()
        synchronize()
    events = profiler.key_averages()
    by = "self_cpu_time_total" if SMOKE else "self_device_time_total"
    path = out / "jobs" / f"{slug(f'profile {form}')}.txt"
    path.write_text(events.table(sort_by=by, row_limit=PROFILED_ROWS, max_name_column_width=60))
    # Annotations are spans over kernels, which would count twice.
    device = [
        e
        for e in profiler.events()
        if e.device_type != torch.autograd.DeviceType.CPU and not _annotates(e)
    ]
    longest = sorted(
        (e for e in events if not _annotates(e)), key=lambda e: getattr(e, by), reverse=True
    )[:12]
    emit(
        {
            "table": path.name,
            "kernels": len(device),
            "device_ms": round(sum(e.self_device_time_total for e in device) / 1e3, 2),
            "host_ms": round(sum(e.self_cpu_time_total for e in events) / 1e3, 2),
            "longest": [
                f"{getattr(e, by) / 1e3:.2f} ms, {e.count} x {e.key[:90]}" for e in longest
            ],
        }
    )
