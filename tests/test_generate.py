"""Generation equals full forwards without a cache, alone or in a batch, and transformers."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    random_ids,
    random_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from seeds import shifted
from torch import Tensor

from gptfast import GPT, Engine, generate, get_tokenizer, ops
from gptfast.engine.rows import Rows
from gptfast.generate import generate_text, stream, stream_text
from gptfast.generation.options import Options
from gptfast.generation.sequences import MIN_ROOM_TOKENS, Sequences
from gptfast.ops.backend import EXTENSION

pytestmark = pytest.mark.usefixtures("way")
SAMPLING = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.3, "seed": 11},
    "top-k": {"top_k": 5, "seed": 3},
    "top-p": {"top_p": 0.6, "seed": 4},
    "min-p": {"min_p": 0.2, "seed": 5},
    "penalty": {"repetition_penalty": 1.7, "seed": 7},
    "greedy-penalty": {"repetition_penalty": 1.7, "temperature": 0.0},
    "all": {
        "temperature": 0.8,
        "top_k": 9,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.2,
        "seed": 6,
    },
}


def lively_model(**changes: Any) -> GPT:
    """Return a model in which positions weigh more than tokens, so greedy text keeps changing."""
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
    """Generate each token from a full forward over the last block_size tokens, without a cache."""
    model.eval()
    penalty = options.pop("repetition_penalty", 1.0)
    for _ in range(n):
        logits = model(torch.tensor([ids[-model.config.block_size :]]))[:, -1]
        for i in set(ids):
            logits[0, i] *= penalty if logits[0, i] < 0 else 1 / penalty
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
    assert len(set(wanted[length:])) > 1


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
            "repetition_penalty": {"repetition_penalty": 3.0},
        }.items()
    }
    assert len({tuple(ids) for ids in drawn.values()}) == 6


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize(
    "lengths",
    [(3, 9, 1), (16, 2, 15), (4, 20, 16, 1), (30, 17)],
    ids=["short", "to-the-context", "beyond-the-context", "all-beyond"],
)
def test_a_row_equals_the_row_alone(model: GPT, name: str, lengths: tuple[int, ...]) -> None:
    prompts = [prompt(length) for length in lengths]
    together = generate(model, prompts, 20, **SAMPLING[name])
    alone = [generate(model, [p], 20, **SAMPLING[name])[0] for p in prompts]
    assert together == alone


@pytest.mark.parametrize("kind", [torch.tensor, list, tuple])
def test_per_row_parameters(model: GPT, kind: Any) -> None:
    prompts = [prompt(4), prompt(6), prompt(2)]
    options = {
        "temperature": [0.0, 1.0, 2.0],
        "top_k": [61, 30, 9],
        "top_p": [1.0, 0.9, 0.8],
        "min_p": [0.0, 0.01, 0.02],
        "repetition_penalty": [1.0, 1.5, 0.8],
        "seed": [1, 2, 3],
    }
    together = generate(model, prompts, 12, **{name: kind(x) for name, x in options.items()})
    alone = [
        generate(model, [p], 12, **{name: values[row] for name, values in options.items()})[0]
        for row, p in enumerate(prompts)
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


def test_equal_prompts_without_a_seed(model: GPT) -> None:
    """The same prompt several times gives several texts; a seed that is given decides alone."""
    a, b = prompt(3), prompt(5)
    rows = generate(model, [a, b, a, a], 20)
    assert rows[:2] == generate(model, [a, b], 20) == generate(model, [a, b], 20, seed=0)
    assert rows == generate(model, [a, b, a, a], 20, seed=[0, 0, 1, 2])
    assert len({tuple(row) for row in rows}) == 4
    same = generate(model, [a, a], 20, seed=7)
    assert same[0] == same[1] == generate(model, [a], 20, seed=7)[0]
    greedy = generate(model, [a, a], 9, temperature=0.0)
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize("zero", [0, 0.0], ids=repr)
def test_a_top_k_of_0_is_off(model: GPT, zero: float) -> None:
    a, b = prompt(3), prompt(5)
    free = generate(model, [a, b], 12, seed=3)
    assert free == generate(model, [a, b], 12, seed=3, top_k=zero, top_p=1, min_p=0)
    mixed = generate(model, [a, b], 12, seed=3, top_k=[0, 1])
    assert mixed[0] == free[0] and mixed[1] == generate(model, [b], 12, top_k=1)[0]
    assert mixed == generate(model, [a, b], 12, seed=3, top_k=torch.tensor([0, 1]))


def test_beams_take_what_switches_sampling_off(model: GPT) -> None:
    beams = generate(model, [prompt(3)], 6, num_beams=3)
    for off in ({"temperature": 0}, {"temperature": 0.0, "top_k": 0}, {"top_p": 1}, {"min_p": 0}):
        assert generate(model, [prompt(3)], 6, num_beams=3, **off) == beams
    for on in ({"temperature": 0.5}, {"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.1}):
        with pytest.raises(ValueError, match="beam search draws nothing: leave out"):
            generate(model, [prompt(3)], 6, num_beams=3, **on)
    with pytest.raises(ValueError, match="length_penalty=2.0 weighs the texts that beams find"):
        generate(model, [prompt(3)], 6, length_penalty=2.0)


@pytest.mark.parametrize("options", [{"seed": 3}, {"num_beams": 2}, {"temperature": 0.0}], ids=str)
def test_an_empty_prompt_starts_from_end_of_text(options: dict[str, Any]) -> None:
    """In training, a text follows the end of the one before."""
    model, tokenizer = random_model(vocab_size=257), get_tokenizer("byte")
    row = generate(model, [[tokenizer.eot]], 6, eos_id=tokenizer.eot, **options)[0]
    text = generate_text(model, tokenizer, "", 6, **options)
    assert text == tokenizer.decode([i for i in row if i != tokenizer.eot])
    assert generate_text(model, tokenizer, ["", "a"], 6, **options)[0] == text
    if "num_beams" not in options:
        assert "".join(stream_text(model, tokenizer, "", 6, **options)) == text


def test_torchs_generator_is_not_used(model: GPT) -> None:
    torch.manual_seed(shifted(1))
    before = torch.get_rng_state()
    first = generate(model, [prompt(3)], 20, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(shifted(2))
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


def count_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one element with every step of a generation."""
    calls, sample, forward = [], ops.sample, Rows.forward
    monkeypatch.setattr(ops, "sample", lambda *a, **k: calls.append(1) or sample(*a, **k))
    monkeypatch.setattr(Rows, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    return calls


def test_generation_ends_once_every_row_has_its_eos(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_steps(monkeypatch)
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


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_greedy_equals_transformers(tied: bool, penalty: float, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    model = lively_model(block_size=40, tie_weights=tied)
    model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    idx = random_ids(3, 7)
    wanted = theirs.generate(
        idx,
        attention_mask=torch.ones_like(idx),
        max_new_tokens=30,
        do_sample=False,
        pad_token_id=0,
        repetition_penalty=penalty,
    )
    rows = generate(model, idx, 30, temperature=0.0, repetition_penalty=penalty)
    assert rows == wanted.tolist()
    assert len(set(wanted[0, 7:].tolist())) > 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be an integer >= 0, got -1"),
        ({"top_k": -1}, "top_k must be an integer >= 1, or 0 for off, got -1"),
        ({"top_k": -3}, "top_k must be .*got -3"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be .*got 1.5"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\], got -0.1"),
        ({"temperature": -1.0}, "temperature must be .*got -1.0"),
        ({"temperature": float("nan")}, "temperature must be .*got nan"),
        ({"temperature": "hot"}, "temperature must be a number, or one for each of 1 rows.*'hot'"),
        ({"temperature": [1.0, 2.0]}, r"temperature must be a number or a tensor of shape \(1,\)"),
        ({"seed": 2**63}, "seed must be an int64, got 9223372036854775808"),
        ({"seed": [2**63]}, "seed must be a number, or one for each of 1 rows"),
        ({"seed": "x", "max_new_tokens": 0}, "seed must be"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a finite number > 0, got 0.0"),
        ({"repetition_penalty": -1}, "repetition_penalty must be .*> 0, got -1.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be .*got inf"),
        ({"repetition_penalty": [1.0, 1.0]}, r"repetition_penalty must be .*shape \(1,\)"),
        ({"repetition_penalty": None}, "repetition_penalty must be .*got None"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer >= 0, got 2.5"),
        ({"max_new_tokens": "5"}, "max_new_tokens must be an integer >= 0, got '5'"),
        (
            {"max_new_tokens": 2**63},
            r"max_new_tokens must be below 2\*\*63, got 9223372036854775808",
        ),
        ({"logprobs": 5}, "logprobs must be True or False, got 5"),
        ({"tokenizer": True}, "tokenizer must have encode, decode and n_vocab.*got True"),
        ({"stop": "a"}, "stop has the string 'a': pass tokenizer="),
        ({"stop": [5]}, "stop must be a string or a list"),
        ({"eos_id": 1.5}, "eos_id must be an integer >= 0, got 1.5"),
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


@pytest.mark.parametrize(
    "idx", ["text", ["text"], 5, [1, 2], [[1.5]], torch.ones(1, 2), [[[1]]]], ids=str
)
def test_wrong_types_of_prompts(model: GPT, idx: Any) -> None:
    with pytest.raises(ValueError, match="idx must be|must be an integer, got"):
        generate(model, idx, 3)


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


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("lengths", [(3, 9, 1), (30, 12)], ids=["short", "beyond-the-context"])
def test_logprobs_equal_full_forwards(model: GPT, name: str, lengths: tuple[int, ...]) -> None:
    prompts = [prompt(length) for length in lengths]
    plain = generate(model, prompts, 20, **SAMPLING[name])
    options = {**SAMPLING[name], "eos_id": plain[0][-8], "stop": [plain[1][-9:-7]]}
    rows, logprobs = generate(model, prompts, 20, logprobs=True, **options)
    assert rows == generate(model, prompts, 20, **options)
    for p, row, of_row in zip(prompts, rows, logprobs, strict=True):
        assert len(of_row) == len(row) - len(p) > 0
        for at, logprob in enumerate(of_row, len(p)):
            window = torch.tensor([row[max(0, at - 16) : at]])
            wanted = model(window)[0, -1].log_softmax(-1)[row[at]].item()
            assert logprob == pytest.approx(wanted, abs=1e-5)
    pairs = list(stream(model, prompts[0], 20, logprobs=True, **options))
    assert [i for i, _ in pairs] == rows[0][lengths[0] :]
    assert [x for _, x in pairs] == pytest.approx(logprobs[0], abs=1e-5)


def test_logprobs_of_nothing(model: GPT) -> None:
    assert generate(model, [[1], [2, 3]], 0, logprobs=True) == ([[1], [2, 3]], [[], []])


@pytest.mark.parametrize("num_beams", [1, 2])
def test_memory_grows_with_the_generated_text(model: GPT, num_beams: int) -> None:
    eos = generate(model, [prompt(4)], 12, temperature=0.0)[0][-1]
    options = {"num_beams": num_beams, "eos_id": eos}
    options |= {"temperature": 0.0} if num_beams == 1 else {"length_penalty": -2.0}
    assert generate(model, [prompt(4)], 10**12, **options)[0][-1] == eos
    assert next(stream(model, prompt(4), 2**63 - 1)) >= 0


def test_room_doubles() -> None:
    model = lively_model(block_size=300)
    sequences = Sequences(model, [[1, 2], [3]])
    assert sequences.tokens.shape == (2, 2 + MIN_ROOM_TOKENS)
    wanted = [naive(model, p, 310, temperature=1.0, seed=2) for p in ([1, 2], [3])]
    assert generate(model, [[1, 2], [3]], 310, seed=2) == wanted


@pytest.mark.parametrize("size", [2**70, 2**2000])
@pytest.mark.parametrize("name", ["temperature", "repetition_penalty", "top_k", "top_p", "seed"])
def test_numbers_beyond_64_bits(name: str, size: int) -> None:
    if size == 2**70 and name in ("temperature", "repetition_penalty"):
        assert len(generate(lively_model(), [[1]], 2, **{name: size})[0]) == 3
        return
    with pytest.raises(ValueError, match=f"{name} must be"):
        generate(lively_model(), [[1]], 2, **{name: size})


@pytest.mark.parametrize("kind", ["model", "engine"])
def test_a_bias_is_added_to_logits_after_the_penalty(kind: str) -> None:
    if kind == "engine" and EXTENSION is None:
        pytest.skip("the C++ extension is not built")
    model = lively_model()
    decoder = Engine(model) if kind == "engine" else model
    plain = generate(decoder, [[1, 2]], 6, temperature=0.0)[0][2:]
    without = generate(decoder, [[1, 2]], 6, temperature=0.0, logit_bias={plain[0]: -100})
    assert plain[0] not in without[0][2:]
    # A penalty on the biased logit would make it 50 and let a bias of 60 win.
    both = {"logit_bias": {3: 100, 4: 60.0}, "repetition_penalty": 2.0}
    assert generate(decoder, [[1, 2], [3]], 3, temperature=0.0, **both) == [
        [1, 2, 3, 3, 3],
        [3, 3, 3, 3],
    ]
    both["seed"] = 5
    assert generate(decoder, [[1]], 9, **both) == generate(decoder, [[1], [2]], 9, **both)[:1]


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        ({61: 1}, IndexError, "logit_bias has token id 61, out of range for a vocabulary of 61"),
        ({1: math.nan}, ValueError, "logit_bias of id 1 must be a number from -10000 to 10000"),
        ({"1": 1}, ValueError, "each id of logit_bias must be an integer"),
        ([1], ValueError, "logit_bias must be a dictionary by id"),
    ],
)
def test_bad_biases(bias: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        generate(lively_model(), [[1]], 1, logit_bias=bias)


def test_beams_have_no_bias() -> None:
    with pytest.raises(ValueError, match="beam search has no logit_bias"):
        generate(lively_model(), [[1]], 1, num_beams=2, logit_bias={1: 1})


NUMBERS = [-1, 0, 1, 2.5, 2**70, float("nan"), float("inf")]
JUNK = st.sampled_from([None, True, *NUMBERS, "a", b"a"])
JUNK |= st.lists(st.sampled_from([None, 0, 1, -1, 0.5, "a", [1]]), max_size=2) | st.just({})
PROMPTS = JUNK | st.lists(st.lists(st.integers(-1, 62), max_size=20) | JUNK, max_size=2)
OPTIONS = st.dictionaries(
    st.sampled_from([field.name for field in dataclasses.fields(Options)] + ["logprobs"]),
    JUNK,
    max_size=3,
)


@settings(max_examples=300, deadline=None)
@given(idx=PROMPTS, n=JUNK | st.integers(0, 3), options=OPTIONS)
def test_anything_works_or_is_refused(idx: Any, n: Any, options: dict[str, Any]) -> None:
    model = lively_model()
    try:
        found = generate(model, idx, n, **options)
    except (ValueError, IndexError) as error:
        assert str(error)
        return
    rows = found[0] if options.get("logprobs") else found
    for prompt, row in zip(idx, rows, strict=True):
        assert row[: len(prompt)] == [*prompt]
        assert len(row) <= len(prompt) + n
