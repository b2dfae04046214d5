"""Test one optimizer step: accumulation, masks, freezing, precision, recomputation, compilation."""

from typing import Any

import pytest
import torch
from helpers import (
    differing,
    parameters,
    random_ids,
    random_model,
)
from seeds import shifted, torch_generator
from torch import Tensor

from gptfast import GPT, TrainConfig
from gptfast.ops.backend import EXTENSION
from gptfast.training.step import RefusedStep, TrainStep, freeze, matmul_precision

CPU = torch.device("cpu")


def batch(B: int, T: int, seed: int, masked: float = 0.0) -> tuple[Tensor, Tensor]:
    x, y = random_ids(B, T, seed=seed), random_ids(B, T, seed=seed + 100)
    generator = torch_generator(seed)
    return x, y.masked_fill(torch.rand(B, T, generator=generator) < masked, -100)


def stepped(batches: list, **options: Any) -> tuple[GPT, dict[str, Any]]:
    """Return a model after one step on these batches, and the step's row."""
    dropout = options.pop("dropout", 0.0)
    model = random_model(dropout=dropout).train()
    step = TrainStep(model, TrainConfig(**options), CPU)
    torch.manual_seed(shifted(1))
    return model, step.run(batches, 1e-2)


def gradients(model: GPT) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("masked", [0.0, 0.7], ids=["all", "masked"])
def test_accumulated_batches_are_one_large_batch(masked: float) -> None:
    """Every target has the same weight, even if the batches are masked unequally."""
    parts = [batch(2, 9, 1), batch(2, 9, 2, masked), batch(2, 9, 3, masked / 2)]
    whole = tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
    small, row = stepped(parts)
    large, wanted = stepped([whole])
    assert row["targets"] == wanted["targets"] == int((whole[1] != -100).sum())
    assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
    for name, grad in gradients(large).items():
        torch.testing.assert_close(gradients(small)[name], grad, rtol=1e-4, atol=1e-7)


def test_a_batch_without_targets_weighs_nothing() -> None:
    empty = batch(2, 9, 4, masked=1.1)
    with_it, row = stepped([batch(2, 9, 1), empty])
    without, wanted = stepped([batch(2, 9, 1)])
    assert row == wanted
    assert differing(parameters(with_it), parameters(without)) == []


def test_a_step_without_targets_is_skipped() -> None:
    model, row = stepped([batch(2, 9, 4, masked=1.1)])
    assert row == {"lr": 1e-2, "targets": 0, "skipped": "every target is masked"}
    assert differing(parameters(model), parameters(random_model())) == []


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        (("wte.weight",), lambda name: name.startswith("wte")),
        (("w?e.*", "h.0.*"), lambda name: name.startswith(("wte", "wpe", "h.0"))),
        (("h.*.attn.*",), lambda name: ".attn." in name),
    ],
    ids=["embedding", "embeddings-and-a-block", "attention"],
)
def test_a_frozen_part_stays(patterns: tuple[str, ...], frozen: Any) -> None:
    model, _ = stepped([batch(2, 9, 1)], freeze=patterns)
    changed = differing(parameters(model), parameters(random_model()))
    assert set(changed) == {name for name, _ in model.named_parameters() if not frozen(name)}
    # The trained parts get the same gradient as without freezing.
    free, _ = stepped([batch(2, 9, 1)])
    wanted = {name: g for name, g in gradients(free).items() if not frozen(name)}
    assert differing(gradients(model), wanted) == []


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["h.9.*"], "freeze: no parameter matches 'h.9.*'; names are like wte.weight"),
        (["*"], "freeze * leaves no parameter to train"),
    ],
    ids=["no-match", "all"],
)
def test_impossible_freezing(patterns: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        freeze(random_model(), patterns)
    assert str(caught.value) == message


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no-dropout", "dropout"])
def test_activation_checkpointing_changes_memory_only(dropout: float) -> None:
    batches = [batch(2, 16, 1)]
    plain, row = stepped(batches, dropout=dropout)
    recomputed, other = stepped(batches, dropout=dropout, activation_checkpointing=True)
    assert row == other
    assert differing(gradients(plain), gradients(recomputed)) == []
    assert differing(parameters(plain), parameters(recomputed)) == []


def test_a_changed_dropout_is_recomputed() -> None:
    """The masks of the recomputation are those of the forward, whoever set the probability."""
    results = []
    for recomputes in (False, True):
        model = random_model().train()
        model.activation_checkpointing = recomputes
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        torch.manual_seed(shifted(1))
        model(*batch(2, 16, 1)).backward()
        results.append(gradients(model))
    assert differing(*results) == []


def test_skip_below_reaches_the_head() -> None:
    """At 0.999 the head's gradient, and so every other, nearly vanishes; at 0 it is whole."""
    batches = [batch(2, 16, 1)]
    plain, row = stepped(batches)
    none, _ = stepped(batches, skip_below=0.0)
    skipped, other = stepped(batches, skip_below=0.999)
    assert row["loss"] == other["loss"]
    assert differing(gradients(plain), gradients(none)) == []
    if EXTENSION is not None:
        assert other["grad_norm"] < 1e-3 * row["grad_norm"]


def test_activation_checkpointing_saves_memory() -> None:
    """Fewer bytes are kept for the backward: a block's input instead of its activations."""

    def kept(recomputes: bool) -> int:
        model = random_model(n_layer=4, block_size=64).train()
        model.activation_checkpointing = recomputes
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(*batch(4, 64, 1))
        assert loss.requires_grad
        return sum(size for where, size in storages.items() if where not in own)

    assert kept(True) < 0.3 * kept(False)


def test_bf16_autocast() -> None:
    batches = [batch(4, 16, 1)]
    fp32, wanted = stepped(batches)
    bf16, row = stepped(batches, precision="bf16")
    assert {p.dtype for p in bf16.parameters()} == {torch.float32}
    # bf16 has 8 bits, so the losses are close but not the same.
    assert row["loss"] == pytest.approx(wanted["loss"], rel=2e-2)
    assert row["loss"] != wanted["loss"]
    for name, grad in gradients(fp32).items():
        difference = (gradients(bf16)[name] - grad).norm() / grad.norm()
        assert 0 < difference < 0.1, name


def test_compiled() -> None:
    batches = [batch(2, 16, 1), batch(2, 16, 2)]
    eager, wanted = stepped(batches)
    compiled, row = stepped(batches, compile=True)
    assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    for name, grad in gradients(eager).items():
        torch.testing.assert_close(gradients(compiled)[name], grad, rtol=1e-3, atol=1e-6)


def test_the_guard_sees_the_norm_before_the_step() -> None:
    model = random_model().train()
    step = TrainStep(model, TrainConfig(skip_zscore=3.0), CPU)
    for i in range(20):
        step.run([batch(2, 9, i % 3)], 1e-4)
    before = parameters(model)
    moments = {p: s["exp_avg"].clone() for p, s in step.optimizer.state.items()}
    with torch.no_grad():
        step.guard.past["grad_norm"].extend([1e-3, 1.1e-3] * 64)
    row = step.run([batch(2, 9, 1)], 1e-4)
    assert row["skipped"].startswith("grad_norm") and "outlier" in row["skipped"]
    assert differing(before, parameters(model)) == []
    assert all(torch.equal(s["exp_avg"], moments[p]) for p, s in step.optimizer.state.items())


def test_the_host_has_time_before_it_reads() -> None:
    """Other work is done after the update was queued, before the guard asks for the numbers."""
    model = random_model().train()
    step, before = TrainStep(model, TrainConfig(skip_zscore=6.0), CPU), parameters(model)
    seen: list[Any] = []

    def meanwhile() -> None:
        seen.append((differing(before, parameters(model)) != [], list(step.guard.past["loss"])))

    row = step.run([batch(2, 9, 1)], 1e-2, meanwhile)
    assert seen == [(True, [])] and list(step.guard.past["loss"]) == [row["loss"]]


def test_a_refused_step_leaves_no_trace() -> None:
    """The guard and the random state are as if the step had never been tried."""
    model = random_model(dropout=0.2).train()
    step = TrainStep(model, TrainConfig(skip_zscore=6.0), CPU)
    for i in range(3):
        step.run([batch(2, 9, i)], 1e-4)
    judged, rng = step.guard.state_dict(), torch.get_rng_state()
    step.model = lambda x, y: model(x, y) + (model.ln_f.bias * 0).sqrt().sum()
    with pytest.raises(RefusedStep, match="grad_norm is (nan|inf)"):
        step.run([batch(2, 9, 5)], 1e-4)
    assert step.guard.state_dict() == judged
    assert torch.equal(torch.get_rng_state(), rng)


def test_matmul_precision_lasts_as_long_as_its_context() -> None:
    before = torch.get_float32_matmul_precision()
    with matmul_precision(TrainConfig(matmul_precision="medium")):
        assert torch.get_float32_matmul_precision() == "medium"
        with matmul_precision(TrainConfig()):
            assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before


def test_matmul_precision_leaves_what_was_inherited_inherited() -> None:
    general, products = torch.backends, (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [x.fp32_precision for x in (general, *products)]
    for x in products:
        x.fp32_precision = "none"
    try:
        with matmul_precision(TrainConfig(matmul_precision="medium")):
            assert [x.fp32_precision for x in products] == ["tf32", "bf16"]
        general.fp32_precision = "tf32"
        assert [x.fp32_precision for x in products] == ["tf32", "tf32"]
        general.fp32_precision = "none"
        for x in products:
            x.fp32_precision = "ieee"
        with matmul_precision(TrainConfig(matmul_precision="medium")):
            pass
        general.fp32_precision = "tf32"
        assert [x.fp32_precision for x in products] == ["ieee", "ieee"]
    finally:
        for x, found in zip((general, *products), before, strict=True):
            x.fp32_precision = found


def test_the_precision_of_products_is_set_in_one_way() -> None:
    found = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        with pytest.raises(ValueError, match="leave one of the two out"):
            with matmul_precision(TrainConfig(matmul_precision="high")):
                pass
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = found
