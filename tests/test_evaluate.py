"""Test evaluation: the token-weighted mean against one by hand, without dropout, and perplexity."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    random_ids,
    random_model,
)
from torch import Tensor

from gptfast import GPT, create_dataloader
from gptfast.evaluate.loss import (
    loader_loss,
    loader_score,
    padded,
    perplexity,
    sliding_score,
)
from gptfast.generation.model_decoder import target_losses


def by_hand(model: GPT, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Return the mean loss of all targets that count, each looked up in its own log-softmax."""
    losses = []
    with torch.no_grad():
        for x, y in batches:
            log_p = F.log_softmax(model(x).double(), -1)
            for row, t in zip(log_p.flatten(0, 1), y.flatten().tolist(), strict=True):
                losses += [-row[t].item()] if t != -100 else []
    return sum(losses) / len(losses)


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    """Return batches of unequal size; one has most of its targets ignored, one has all."""
    shapes = [(4, 16), (4, 9), (1, 3), (2, 16), (2, 5)]
    out = [(random_ids(*s, seed=i), random_ids(*s, seed=9 + i)) for i, s in enumerate(shapes)]
    out[3][1][:, 2:] = -100
    out[4][1][:] = -100
    return out


def test_mean_counts_every_token_once(batches: list[tuple[Tensor, Tensor]]) -> None:
    model = random_model().eval()
    wanted = by_hand(model, batches)
    assert abs(loader_loss(model, batches) - wanted) < 1e-5
    # The mean of the batches' means differs.
    means = [model(x, y).item() for x, y in batches[:-1]]
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
    """Dropout is off during evaluation; afterwards every module has its own mode again."""
    from gptfast import generate
    from gptfast.evaluate.loss import loader_loss

    batch = [(random_ids(2, 8), random_ids(2, 8, seed=3))]
    calm = random_model()
    for top in (True, False):
        model = random_model(dropout=0.5).train(top)
        model.h[0].train(not top)
        modes = [module.training for module in model.modules()]
        assert loader_loss(model, batch) == loader_loss(calm, batch)
        assert generate(model, [[1, 2]], 9, seed=1) == generate(calm, [[1, 2]], 9, seed=1)
        assert [module.training for module in model.modules()] == modes


# The tests below use a sliding window.


def by_the_recipe(model: GPT, tokens: Tensor, max_length: int, stride: int) -> tuple[float, float]:
    """Follow transformers' "Perplexity of fixed-length models" on transformers' model; return the
    loss behind its perplexity, and the sum of the losses with each token counted once."""
    from test_weights import hf_model

    theirs = hf_model(model)
    nll_sum, n_tokens, before, nats = 0.0, 0, 0, 0.0
    for begin in range(0, len(tokens), stride):
        end = min(begin + max_length, len(tokens))
        new = end - before
        ids = tokens[None, begin:end]
        labels = ids.clone()
        labels[:, :-new] = -100
        with torch.no_grad():
            loss = theirs(ids, labels=labels).loss.item()
        nll_sum += loss * (new - 1) if new > 1 else 0.0
        n_tokens += new - 1
        nats += loss * int((labels[:, 1:] != -100).sum()) if end - begin > 1 else 0.0
        before = end
        if end == len(tokens):
            break
    return nll_sum / n_tokens, nats


@pytest.mark.parametrize("n", [16, 17, 100, 131])
@pytest.mark.parametrize(("max_length", "stride"), [(16, 8), (16, 16), (16, 1), (16, 5), (10, 7)])
def test_sliding_window_is_transformers_recipe(n: int, max_length: int, stride: int) -> None:
    pytest.importorskip("transformers")
    model, tokens = random_model(n_embd=128, block_size=16), random_ids(n)
    score = sliding_score(
        model, tokens, BYTE_61, max_length=max_length, stride=stride, batch_size=3
    )
    loss, nats = by_the_recipe(model, tokens, max_length, stride)
    assert abs(score.loss - loss) < 1e-5
    assert abs(score.nats - nats) < 1e-3


class Bytes61:
    """A tokenizer of 61 tokens with i % 4 bytes each; the last is end-of-text."""

    name, n_vocab, eot = "61", 61, 60

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join(b"x" * (i % 4) for i in ids)


BYTE_61 = Bytes61()


def test_bits_per_byte_by_hand() -> None:
    model, tokens = random_model().eval(), random_ids(40)
    tokens[7] = 60
    score = sliding_score(model, tokens, BYTE_61, max_length=16, stride=16)
    rows = [(tokens[i : i + 16][None, :-1], tokens[i : i + 16][None, 1:]) for i in (0, 16, 32)]
    predicted = torch.cat([y[0] for _, y in rows]).tolist()
    n_bytes = sum(i % 4 for i in predicted if i != 60)
    nats = by_hand(model, rows) * len(predicted)
    assert score.n_bytes == n_bytes
    assert abs(score.bits_per_byte - nats / math.log(2) / n_bytes) < 1e-5
    loader = create_dataloader(tokens, 2, 13, 13, shuffle=False, drop_last=False)
    score = loader_score(model, loader, BYTE_61)
    assert score.loss == loader_loss(model, loader)
    targets = torch.cat([y.flatten() for _, y in loader]).tolist()
    assert score.n_bytes == sum(i % 4 for i in targets if i not in (60, -100))
    assert abs(score.nats - score.loss * 39) < 1e-6


def test_a_bf16_model_is_measured_in_fp32() -> None:
    model, tokens = random_model(std=0.5).bfloat16(), random_ids(300)
    score = sliding_score(model, tokens, BYTE_61, max_length=16, stride=8)
    fp32 = sliding_score(model.float(), tokens, BYTE_61, max_length=16, stride=8)
    # Losses rounded to bf16 would each be off by about 0.4 %, up or down.
    assert 0 < abs(score.loss - fp32.loss) < 0.02 * fp32.loss
    rows = [(tokens[:16], tokens[1:17])]
    x, y = padded(rows)
    model = model.bfloat16()
    losses = target_losses(model, model.hidden(x), y)
    assert losses.dtype == torch.float32
    assert not torch.equal(losses, losses.bfloat16().float())


@pytest.mark.parametrize(
    ("options", "n", "message"),
    [
        ({"max_length": 16, "stride": 0}, 40, "stride must be from 1 to max_length=16, got 0"),
        ({"max_length": 16, "stride": 17}, 40, "stride must be from 1 to max_length=16, got 17"),
        ({"max_length": 17, "stride": 4}, 40, "max_length must be from 2 to block_size=16, got 17"),
        ({"max_length": 1, "stride": 1}, 40, "max_length must be from 2"),
        ({"max_length": 16, "stride": 4}, 1, "at least two tokens, got 1"),
    ],
)
def test_bad_windows(options: dict[str, int], n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sliding_score(random_model(), random_ids(n), BYTE_61, **options)
