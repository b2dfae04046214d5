"""Generation: equal to full forwards without a cache, alone or in a batch, and to transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    one_thread,  # noqa: F401 - applies to every test here
    random_ids,
    random_model,
)
from torch import Tensor

from gptfast import GPT, generate, get_tokenizer, ops
from gptfast.generate import generate_text

SAMPLING = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.3, "seed": 11},
    "top-k": {"top_k": 5, "seed": 3},
    "top-p": {"top_p": 0.6, "seed": 4},
    "min-p": {"min_p": 0.2, "seed": 5},
    "all": {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.05, "seed": 6},
}


def lively_model(**changes: Any) -> GPT:
    """Positions weigh more than the last token, so that greedy text does not settle on one id."""
    model = random_model(std=0.4, **{"tie_weights": False, **changes})
    with torch.no_grad():
        model.wpe.weight.mul_(3)
        model.ln_f.bias.zero_()
    return model


@pytest.fixture
def model() -> GPT:
    return lively_model()


def prompt(length: int) -> list[int]:
    return random_ids(length, seed=length).tolist()


@torch.no_grad()
def naive(model: GPT, ids: list[int], n: int, **options: float) -> list[int]:
    """Each token from a full forward over the last block_size tokens: no cache, no batch."""
    model.eval()
    for _ in range(n):
        logits = model(torch.tensor([ids[-model.config.block_size :]]))[:, -1]
        if options["temperature"] == 0:
            ids = ids + [int(logits[0].argmax())]
        else:
            ids = ids + ops.sample(logits, position=len(ids), **options).tolist()
    return ids


# The context is 16 tokens.
@pytest.mark.parametrize("length", [1, 2, 7, 15, 16, 17, 40])
@pytest.mark.parametrize("name", ["greedy", "sampled"])
def test_equals_full_forwards(model: GPT, name: str, length: int) -> None:
    options = {"temperature": 1.0, **SAMPLING[name]}
    wanted = naive(model, prompt(length), 24, **options)
    assert generate(model, [prompt(length)], 24, **options) == [wanted]
    assert len(set(wanted[length:])) > 5


@pytest.mark.parametrize("name", SAMPLING)
def test_parameters_pass_through(model: GPT, name: str) -> None:
    options = {"temperature": 1.0, **SAMPLING[name]}
    wanted = naive(model, prompt(5), 30, **options)
    assert generate(model, [prompt(5)], 30, **options) == [wanted]


def test_each_parameter_changes_the_draw(model: GPT) -> None:
    drawn = {
        name: generate(model, [prompt(5)], 30, seed=1, **options)[0]
        for name, options in {
            "plain": {},
            "temperature": {"temperature": 3.0},
            "top_k": {"top_k": 2},
            "top_p": {"top_p": 0.2},
            "min_p": {"min_p": 0.9},
        }.items()
    }
    assert len({tuple(ids) for ids in drawn.values()}) == 5


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize(
    "lengths",
    [(3, 9, 1), (16, 2, 15), (4, 20, 16, 1), (30, 17)],
    ids=["short", "to-the-context", "beyond-the-context", "all-beyond"],
)
def test_a_row_gets_what_it_gets_alone(model: GPT, name: str, lengths: tuple[int, ...]) -> None:
    prompts = [prompt(length) for length in lengths]
    together = generate(model, prompts, 20, **SAMPLING[name])
    alone = [generate(model, [p], 20, **SAMPLING[name])[0] for p in prompts]
    assert together == alone


def test_per_row_parameters(model: GPT) -> None:
    prompts = [prompt(4), prompt(6), prompt(2)]
    together = generate(
        model,
        prompts,
        12,
        temperature=torch.tensor([0.0, 1.0, 2.0]),
        seed=torch.tensor([1, 2, 3]),
    )
    alone = [
        generate(model, [p], 12, temperature=t, seed=s)[0]
        for p, t, s in zip(prompts, (0.0, 1.0, 2.0), (1, 2, 3), strict=True)
    ]
    assert together == alone


def test_tensor_and_list_prompts_are_the_same(model: GPT) -> None:
    idx = random_ids(3, 5)
    rows = generate(model, idx, 8, seed=2)
    assert rows == generate(model, idx.tolist(), 8, seed=2)
    assert [row[:5] for row in rows] == idx.tolist()
    assert [len(row) for row in rows] == [13] * 3


def test_seed_reproduces(model: GPT) -> None:
    drawn = [generate(model, [prompt(3)], 40, seed=s)[0] for s in (7, 7, 8)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_torchs_generator_plays_no_part(model: GPT) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = generate(model, [prompt(3)], 20, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert generate(model, [prompt(3)], 20, seed=7) == first


def test_eos_stops_its_own_row_only(model: GPT) -> None:
    prompts = [prompt(3), prompt(5), prompt(2)]
    free = generate(model, prompts, 30, seed=9)
    eos = free[0][3 + 4]
    stopped = generate(model, prompts, 30, seed=9, eos_id=eos)
    for row, whole, start in zip(stopped, free, (3, 5, 2), strict=True):
        new = whole[start:]
        end = new.index(eos) + 1 if eos in new else len(new)
        assert row == whole[: start + end]
    assert len(stopped[0]) <= 3 + 5


def test_eos_in_the_prompt_does_not_stop(model: GPT) -> None:
    options = {"temperature": 3.0, "seed": 1}
    free = generate(model, [prompt(6)], 60, **options)[0]
    eos = next(i for i in free[6:] if i in free[:6])
    stopped = generate(model, [prompt(6)], 60, eos_id=eos, **options)[0]
    assert stopped == free[: free.index(eos, 6) + 1]


def test_generation_ends_once_every_row_has_its_eos(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = ops.sample
    monkeypatch.setattr(ops, "sample", lambda *a, **k: calls.append(1) or real(*a, **k))
    first = generate(model, [prompt(4)], 1, temperature=0.0)[0][-1]
    calls.clear()
    assert len(generate(model, [prompt(4)], 500, temperature=0.0, eos_id=first)[0]) == 5
    assert len(calls) <= 8


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_dropout_is_off_and_the_mode_restored(training: bool) -> None:
    model = lively_model(dropout=0.5).train(training)
    rows = generate(model, [prompt(3)], 30, seed=1)
    assert model.training is training
    assert rows == generate(lively_model(), [prompt(3)], 30, seed=1)


def test_nothing_to_do(model: GPT) -> None:
    assert generate(model, [[1, 2], [3]], 0) == [[1, 2], [3]]
    assert generate(model, [], 5) == []


def test_inputs_are_not_changed(model: GPT) -> None:
    prompts, idx = [prompt(3), prompt(5)], random_ids(2, 4)
    copies = [list(p) for p in prompts], idx.clone()
    generate(model, prompts, 5)
    generate(model, idx, 5)
    assert prompts == copies[0]
    assert torch.equal(idx, copies[1])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_greedy_equals_transformers(tied: bool, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    model = lively_model(block_size=40, tie_weights=tied)
    model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    idx = random_ids(3, 7)
    wanted = theirs.generate(
        idx, attention_mask=torch.ones_like(idx), max_new_tokens=30, do_sample=False, pad_token_id=0
    )
    assert generate(model, idx, 30, temperature=0.0) == wanted.tolist()
    assert len(set(wanted[0, 7:].tolist())) > 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be >= 0, got -1"),
        ({"top_k": 0}, "top_k must be an integer >= 1, got 0"),
        ({"top_k": -3}, "top_k must be .*got -3"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be .*got 1.5"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\], got -0.1"),
        ({"temperature": -1.0}, "temperature must be .*got -1.0"),
        ({"temperature": float("nan")}, "temperature must be .*got nan"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if type(value) is dict else "",
)
def test_parameters_out_of_range(model: GPT, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, [prompt(3)], **{"max_new_tokens": 3, **options})


@pytest.mark.parametrize(
    "idx", [[[]], [[1], []], torch.zeros(2, 0, dtype=torch.int64)], ids=["one", "second", "tensor"]
)
def test_empty_prompt(model: GPT, idx: Tensor | list) -> None:
    with pytest.raises(ValueError, match="prompt [01] is empty"):
        generate(model, idx, 3)


def test_flat_prompt_is_refused(model: GPT) -> None:
    with pytest.raises(ValueError, match=r"idx must be \(B, T\) .*got shape \(4,\)"):
        generate(model, random_ids(4), 3)


@pytest.mark.parametrize("bad", [61, -1])
def test_ids_out_of_range(model: GPT, bad: int) -> None:
    with pytest.raises(IndexError, match=f"prompt 1 has token id {bad}, out of range"):
        generate(model, [[1, 2], [3, bad]], 3)


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_nan_weights(model: GPT, temperature: float) -> None:
    with torch.no_grad():
        model.ln_f.weight[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        generate(model, [prompt(3)], 3, temperature=temperature)


def test_text_to_text() -> None:
    byte = get_tokenizer("byte")
    # More ids than the tokenizer has: those stand for no text.
    model = lively_model(vocab_size=400)
    ids = generate(model, [byte.encode("ab")], 60, seed=2, eos_id=byte.eot)[0]
    assert max(ids) >= byte.n_vocab
    text = generate_text(model, byte, "ab", 60, seed=2)
    assert text == byte.decode([i for i in ids if i < byte.n_vocab])
    assert text.startswith("ab")
