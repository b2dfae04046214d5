"""Beam search gives transformers' ids, alone or in a batch, and a plain loop's past the context."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    random_ids,
    random_model,
)

from gptfast import GPT, generate, get_tokenizer
from gptfast.generation.sequences import Sequences

pytestmark = pytest.mark.usefixtures("way")
V = 31
PENALTIES = [-1.0, 0.0, 0.5, 1.0, 2.0]


def open_model(seed: int = 0, **changes: Any) -> GPT:
    """Return a model that prefers no token strongly: beams differ and end at different lengths."""
    model = random_model(
        seed=seed, std=0.4, **{"vocab_size": V, "block_size": 64, "tie_weights": False, **changes}
    )
    with torch.no_grad():
        model.wpe.weight.mul_(3)
        model.ln_f.bias.zero_()
        model.lm_head.weight.mul_(0.5)
    return model


def new_of(model: GPT, prompt: list[int], n: int, **options: Any) -> list[int]:
    return generate(model, [prompt], n, **options)[0][len(prompt) :]


@pytest.mark.parametrize("seed", range(4))
def test_equals_transformers(seed: int, tmp_path: Path) -> None:
    """Try 30 settings per model with two prompts each, and an eos that beams reach early."""
    from transformers import GPT2LMHeadModel

    model = open_model(seed)
    model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    theirs.generation_config.eos_token_id = None
    idx = random_ids(2, 5, vocab_size=V, seed=seed)
    n, lengths = 20, set()
    for K in (2, 3, 5):
        eos = new_of(model, idx[0].tolist(), n, num_beams=K)[2 + 3 * (seed % 2)]
        for length_penalty in PENALTIES:
            for eos_id in (None, eos):
                options = {"num_beams": K, "length_penalty": length_penalty}
                wanted = theirs.generate(
                    idx,
                    attention_mask=torch.ones_like(idx),
                    max_new_tokens=n,
                    do_sample=False,
                    early_stopping=False,
                    pad_token_id=V,
                    **options,
                    **({} if eos_id is None else {"eos_token_id": eos_id}),
                ).tolist()
                wanted = [[i for i in row if i != V] for row in wanted]
                assert generate(model, idx, n, eos_id=eos_id, **options) == wanted
                lengths |= {len(row) for row in wanted}
    assert len(lengths) > 2


@pytest.mark.parametrize("penalty", [0.7, 1.5])
@pytest.mark.parametrize("K", [2, 4])
def test_repetition_penalty_equals_transformers(K: int, penalty: float, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    model = open_model(7)
    model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    idx = random_ids(3, 6, vocab_size=V)
    options = {"num_beams": K, "repetition_penalty": penalty}
    wanted = theirs.generate(
        idx,
        attention_mask=torch.ones_like(idx),
        max_new_tokens=25,
        do_sample=False,
        early_stopping=False,
        pad_token_id=V,
        **options,
    )
    assert generate(model, idx, 25, **options) == wanted.tolist()
    assert generate(model, idx, 25, num_beams=K) != wanted.tolist()


@torch.no_grad()
def plain_beams(model: GPT, prompt: list[int], n: int, K: int) -> list[int]:
    """Search with beams that never end and a full forward over the last block_size tokens."""
    beams = [(0.0, prompt)]
    for _ in range(n):
        idx = [ids[-model.config.block_size :] for _, ids in beams]
        logprobs = model(torch.tensor(idx))[:, -1].log_softmax(-1)
        totals = logprobs + torch.tensor([total for total, _ in beams])[:, None]
        best, index = totals.flatten().topk(K)
        beams = [
            (total, beams[at // V][1] + [at % V])
            for total, at in zip(best.tolist(), index.tolist(), strict=True)
        ]
    return beams[0][1]


@pytest.mark.parametrize("length", [1, 9, 16, 17, 30])
@pytest.mark.parametrize("K", [2, 5])
def test_past_the_context(K: int, length: int) -> None:
    model = open_model(2, block_size=16)
    prompt = random_ids(length, vocab_size=V, seed=length).tolist()
    assert generate(model, [prompt], 20, num_beams=K) == [plain_beams(model, prompt, 20, K)]


@pytest.mark.parametrize("length_penalty", PENALTIES)
@pytest.mark.parametrize("stop", [None, "eos", "ids", "text"])
def test_a_row_equals_the_row_alone(stop: str | None, length_penalty: float) -> None:
    byte = get_tokenizer("byte")
    model = open_model(3, block_size=16, vocab_size=40)
    prompts = [random_ids(n, vocab_size=40, seed=n).tolist() for n in (3, 9, 1, 20)]
    free = generate(model, prompts, 12, num_beams=3)
    ends = [free[0][7], free[1][12]]
    options = {
        None: {},
        "eos": {"eos_id": ends[0]},
        "ids": {"stop": [[end] for end in ends]},
        "text": {"stop": [chr(end) for end in ends], "tokenizer": byte},
    }[stop]
    options |= {"num_beams": 3, "length_penalty": length_penalty, "repetition_penalty": 1.1}
    together = generate(model, prompts, 12, **options)
    assert together == [generate(model, [p], 12, **options)[0] for p in prompts]
    # A penalty below 0 prefers the shortest, so rows end at their first stop.
    if stop and length_penalty < 0:
        assert len({len(row) - len(p) for row, p in zip(together, prompts, strict=True)}) > 1


@pytest.mark.parametrize("K", [2, 5])
@pytest.mark.parametrize("length_penalty", PENALTIES)
def test_a_stop_scores_as_eos_does_and_is_cut_off(K: int, length_penalty: float) -> None:
    model = open_model(4)
    prompt = random_ids(4, vocab_size=V).tolist()
    options = {"num_beams": K, "length_penalty": length_penalty}
    eos = new_of(model, prompt, 20, num_beams=K)[4]
    kept = generate(model, [prompt], 20, eos_id=eos, **options)[0]
    wanted = kept[:-1] if kept[-1] == eos else kept
    assert generate(model, [prompt], 20, stop=[[eos]], **options) == [wanted]
    byte = get_tokenizer("byte")
    assert generate(model, [prompt], 20, stop=chr(eos), tokenizer=byte, **options) == [wanted]


def test_every_continuation_stops() -> None:
    model = open_model(5)
    first, *others = (random_ids(3 + i, vocab_size=V, seed=i).tolist() for i in range(30))
    best = new_of(model, first, 1, num_beams=3)
    # One row ends at once; the other goes on.
    ends = next(p for p in others if new_of(model, p, 1, num_beams=3) != best)
    prompts = [first, ends]
    stop = [[i] for i in range(V)]
    assert generate(model, prompts, 10, num_beams=3, stop=stop) == prompts
    stop = [[i] for i in range(V) if i != best[0]]
    options = {"num_beams": 3, "length_penalty": -1.0, "stop": stop}
    rows = generate(model, prompts, 10, **options)
    assert rows == [generate(model, [p], 10, **options)[0] for p in prompts]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_logprobs_equal_full_forwards(penalty: float) -> None:
    model = open_model(6)
    prompts = [random_ids(n, vocab_size=V, seed=n).tolist() for n in (2, 7)]
    free = generate(model, prompts, 15, num_beams=3)
    rows, logprobs = generate(
        model,
        prompts,
        15,
        num_beams=3,
        repetition_penalty=penalty,
        eos_id=free[0][8],
        stop=[[free[1][11]]],
        logprobs=True,
    )
    for prompt, row, of_row in zip(prompts, rows, logprobs, strict=True):
        wanted = (
            model(torch.tensor([row]))[0]
            .log_softmax(-1)[:-1]
            .gather(1, torch.tensor(row)[1:, None])[len(prompt) - 1 :, 0]
        )
        assert torch.allclose(torch.tensor(of_row), wanted, atol=1e-5, rtol=0)


def test_the_best_of_all_continuations() -> None:
    """With as many candidates as a token has continuations, two steps find the best pair."""
    model = open_model(8, vocab_size=8)
    idx = [[1, 2, 3, a, b] for a in range(8) for b in range(8)]
    logprobs = model(torch.tensor(idx)).log_softmax(-1)
    first, second = (
        logprobs[:, t].gather(1, torch.tensor(idx)[:, t + 1 : t + 2])[:, 0] for t in (2, 3)
    )
    best = idx[(first + second).argmax()]
    assert generate(model, [[1, 2, 3]], 2, num_beams=4) == [best]


def test_only_living_beams_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is reordered, not recomputed: after the prompt, every forward is of one token."""
    monkeypatch.setattr("gptfast.engine.choice.dtype_to_pack", lambda model, n: None)
    widths = []
    model = open_model()
    real = GPT.hidden

    def hidden(self: GPT, idx: torch.Tensor, **options: Any) -> torch.Tensor:
        widths.append(tuple(idx.shape))
        return real(self, idx, **options)

    monkeypatch.setattr(GPT, "hidden", hidden)
    generate(model, random_ids(2, 5, vocab_size=V), 6, num_beams=3)
    assert widths == [(2, 5)] + [(6, 1)] * 5


def test_select_repeats_and_reorders_rows() -> None:
    model = open_model()
    a, b = random_ids(2, 5, vocab_size=V)
    with torch.inference_mode():
        both = Sequences(model, [a.tolist(), b.tolist()])
        both.logits()
        both.select(torch.tensor([1, 0, 1]))
        both.append(torch.tensor([3, 4, 5]))
        logits = both.logits()
        idx = torch.stack([b, a, b])
        wanted = model(torch.cat([idx, torch.tensor([[3], [4], [5]])], 1))[:, -1]
    assert torch.allclose(logits, wanted, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_dropout_is_off_and_the_mode_restored(training: bool) -> None:
    model = open_model(dropout=0.5).train(training)
    rows = generate(model, [[1, 2]], 12, num_beams=3)
    assert model.training is training
    assert rows == generate(open_model(), [[1, 2]], 12, num_beams=3, seed=5)


def test_huge_length_penalties() -> None:
    """No power of a length overflows; such a penalty makes the longest or the shortest win."""
    model = open_model()
    eos = new_of(model, [1], 20, num_beams=3)[3]
    for length_penalty in (1e5, -1e5):
        row = generate(model, [[1]], 20, num_beams=3, eos_id=eos, length_penalty=length_penalty)
        assert 1 < len(row[0]) <= 21


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams must be an integer >= 1, got 0"),
        ({"num_beams": 16}, "num_beams must be from 1 to 15, got 16: .*2 .* num_beams candidates"),
        ({"num_beams": 2.5}, "num_beams must be an integer >= 1, got 2.5"),
        ({"num_beams": 2, "temperature": 0.5}, "leave out temperature=0.5"),
        ({"num_beams": 2, "temperature": [0.0]}, r"leave out temperature=\[0.0\]"),
        ({"num_beams": 2, "temperature": torch.zeros(1)}, "leave out temperature=tensor"),
        ({"num_beams": 2, "top_k": 4}, "leave out top_k=4"),
        ({"num_beams": 2, "top_p": 0.5}, "leave out top_p=0.5"),
        ({"num_beams": 2, "min_p": 0.1}, "leave out min_p=0.1"),
        ({"length_penalty": float("inf")}, "length_penalty must be a finite number, got inf"),
        ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty must be .*got nan"),
        ({"num_beams": 2, "length_penalty": "long"}, "length_penalty must be .*got long"),
        ({"num_beams": 2, "repetition_penalty": 0}, "repetition_penalty must be .*> 0, got 0"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if type(value) is dict else "",
)
def test_options_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(open_model(), [[1, 2]], 3, **options)


def test_temperature_0_asks_for_no_drawing_either() -> None:
    options = {"num_beams": 2, "eos_id": None}
    beams = generate(open_model(), [[1, 2]], 5, **options)
    assert generate(open_model(), [[1, 2]], 5, temperature=0, **options) == beams


def test_nan_weights() -> None:
    model = open_model()
    with torch.no_grad():
        model.ln_f.weight[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        generate(model, [[1, 2]], 3, num_beams=2)
