"""Evaluation: the token-weighted mean by hand, without dropout, and perplexity."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    one_thread,  # noqa: F401 - applies to every test here
    random_ids,
    random_model,
)
from torch import Tensor

from gptfast import GPT, create_dataloader
from gptfast.evaluate import batch_loss, loader_loss, perplexity


def by_hand(model: GPT, batches: list[tuple[Tensor, Tensor]]) -> float:
    """The mean over every target that counts, each looked up in its own log-softmax."""
    losses = []
    with torch.no_grad():
        for x, y in batches:
            log_p = F.log_softmax(model(x).double(), -1)
            for row, t in zip(log_p.flatten(0, 1), y.flatten().tolist(), strict=True):
                losses += [-row[t].item()] if t != -100 else []
    return sum(losses) / len(losses)


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    """Batches of unequal size, one with most of its targets ignored, one with all."""
    shapes = [(4, 16), (4, 9), (1, 3), (2, 16), (2, 5)]
    out = [(random_ids(*s, seed=i), random_ids(*s, seed=9 + i)) for i, s in enumerate(shapes)]
    out[3][1][:, 2:] = -100
    out[4][1][:] = -100
    return out


def test_mean_counts_every_token_once(batches: list[tuple[Tensor, Tensor]]) -> None:
    model = random_model().eval()
    wanted = by_hand(model, batches)
    assert abs(loader_loss(model, batches) - wanted) < 1e-5
    # The mean of the batches' means is another number.
    means = [batch_loss(model, x, y).item() for x, y in batches[:-1]]
    assert abs(sum(means) / len(means) - wanted) > 1e-3


def test_short_last_batch_of_a_loader() -> None:
    model, tokens = random_model().eval(), random_ids(16 * 7 + 1)
    loader = create_dataloader(tokens, 3, 16, 16, shuffle=False, drop_last=False)
    assert [len(x) for x, _ in loader] == [3, 3, 1]
    x, y = tokens[:-1].view(7, 16), tokens[1:].view(7, 16)
    assert abs(loader_loss(model, loader) - by_hand(model, [(x, y)])) < 1e-5


@pytest.mark.parametrize("n", [1, 2, 3, 99])
def test_max_batches(n: int, batches: list[tuple[Tensor, Tensor]]) -> None:
    model = random_model().eval()
    assert abs(loader_loss(model, batches, n) - by_hand(model, batches[:n])) < 1e-5


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_dropout_is_off_and_the_mode_restored(
    training: bool, batches: list[tuple[Tensor, Tensor]]
) -> None:
    model = random_model(dropout=0.5).train(training)
    loss = loader_loss(model, batches)
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    assert abs(loss - by_hand(model.eval(), batches)) < 1e-5


def test_mode_is_restored_after_an_error() -> None:
    model = random_model().train()
    with pytest.raises(IndexError):
        loader_loss(model, [(torch.tensor([[99]]), torch.tensor([[0]]))])
    assert model.training


def test_no_gradient_is_kept(batches: list[tuple[Tensor, Tensor]]) -> None:
    model = random_model()
    loader_loss(model, batches)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("which", ["empty", "ignored"])
def test_nothing_to_evaluate(which: str, batches: list[tuple[Tensor, Tensor]]) -> None:
    with pytest.raises(ValueError, match="no tokens to evaluate"):
        loader_loss(random_model(), [] if which == "empty" else batches[4:])


def test_perplexity() -> None:
    assert perplexity(0.0) == 1.0
    assert math.isclose(perplexity(math.log(50257)), 50257)
    assert perplexity(1000.0) == math.inf
    assert perplexity(math.inf) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_every_module_keeps_its_own_mode() -> None:
    """Dropout is off inside, whoever had it on; a part kept in evaluation mode stays there."""
    from gptfast import generate
    from gptfast.evaluate import loader_loss

    batch = [(random_ids(2, 8), random_ids(2, 8, seed=3))]
    calm = random_model()
    for top in (True, False):
        model = random_model(dropout=0.5).train(top)
        model.h[0].train(not top)
        modes = [module.training for module in model.modules()]
        assert loader_loss(model, batch) == loader_loss(calm, batch)
        assert generate(model, [[1, 2]], 9, seed=1) == generate(calm, [[1, 2]], 9, seed=1)
        assert [module.training for module in model.modules()] == modes
