"""The training step on a GPU: eager, compiled and captured beside one another, and profiled."""

from collections.abc import Callable
from pathlib import Path

import torch
from gpu_device import SMOKE, synchronize
from gpu_jobs import Emit, slug
from gpu_train import OURS, steps
from torch import Tensor

from gptfast import GPT, AdamW, GPTConfig

STEPS = 1 if SMOKE else 5
PROFILED_ROWS = 40


def _small_step(compiled: bool) -> Callable[[], Tensor]:
    """Return a training step of a small GPT, in bf16 with fp32 masters, that returns its loss."""
    torch.manual_seed(0)
    T = 8 if SMOKE else 256
    config = GPTConfig(vocab_size=50257, block_size=T, n_layer=2, n_head=2, n_embd=128)
    if SMOKE:
        config = GPTConfig(vocab_size=101, block_size=T, n_layer=1, n_head=2, n_embd=32)
    model = GPT(config)
    model = model if SMOKE else model.bfloat16()
    optimizer = AdamW(model.parameters(), lr=1e-3, max_norm=1.0)
    idx, target = torch.randint(config.vocab_size, (2, 2, T))  # (B, T) each
    f = torch.compile(model, fullgraph=True) if compiled and not SMOKE else model

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = f(idx, target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _losses_captured() -> list[float]:
    """Return the losses of two steps on a second stream and of the replays of a third."""
    step = _small_step(compiled=False)
    if SMOKE:
        return [step().item() for _ in range(STEPS)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        losses = [step().item() for _ in range(2)]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for _ in range(STEPS - len(losses)):
        graph.replay()
        losses.append(loss.item())
    return losses


def check_step(form: str, emit: Emit) -> None:
    """Compare five steps of a form with five eager ones: captured ones must be the same bits."""
    step = _small_step(compiled=False)
    eager = [step().item() for _ in range(STEPS)]
    emit({"eager": eager})
    if form == "captured":
        losses = _losses_captured()
    else:
        step = _small_step(compiled=form == "compiled")
        losses = [step().item() for _ in range(STEPS)]
    largest = max(abs(a - b) for a, b in zip(losses, eager, strict=True))
    same = losses == eager
    emit({"eager": eager, form: losses, "same_bits": same, "largest_difference": largest})
    # A compiler may round sums of 16 bits otherwise.
    assert same or form == "compiled", f"{form} steps differ from eager ones by {largest:.3g}"


def _annotates(event: object) -> bool:
    """Return whether an event of the profiler is a name that was given to a span of time."""
    return bool(getattr(event, "is_user_annotation", False))


def profile_step(form: str, out: Path, emit: Emit) -> None:
    """Profile a step of `gptfast train --precision bf16`, B=16 and T=1024; the table is a file."""
    from torch.profiler import ProfilerActivity, profile

    step = steps(form, 16, SMOKE, (OURS,))[OURS]
    for _ in range(0 if SMOKE else 3):
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
