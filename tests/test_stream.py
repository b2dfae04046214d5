"""Test streams, stops and text: ids and text are the same whole or token by token."""

import re

import pytest
import torch
from helpers import (
    random_ids,
)
from test_generate import SAMPLING, count_steps, lively_model, naive, prompt

from gptfast import GPT, generate, get_tokenizer
from gptfast.generate import generate_text, stream, stream_text

pytestmark = pytest.mark.usefixtures("way")


@pytest.fixture
def model() -> GPT:
    return lively_model()


@pytest.mark.parametrize("name", ["greedy", "sampled"])
def test_alone_batched_streamed_and_uncached_are_one(model: GPT, name: str) -> None:
    prompts = [random_ids(1 + n % 40, seed=1000 + n).tolist() for n in range(200)]
    options = {"temperature": 1.0, **SAMPLING[name]}
    wanted = [naive(model, p, 8, **options) for p in prompts]
    assert [generate(model, [p], 8, **options)[0] for p in prompts] == wanted
    assert [p + list(stream(model, p, 8, **options)) for p in prompts] == wanted
    for size in (7, 41):
        batches = [prompts[at : at + size] for at in range(0, 200, size)]
        rows = [row for batch in batches for row in generate(model, batch, 8, **options)]
        assert rows == wanted


def byte_model(seed: int = 0) -> GPT:
    """Return a model that draws bytes of two-byte characters and ASCII, with few repetitions."""
    model = lively_model(vocab_size=400)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)
        model.lm_head.weight[0x80:0xC2] *= 0.6
    return model


@pytest.mark.parametrize("seed", range(6))
def test_stop_strings_and_ids(seed: int) -> None:
    """Rows end before their stops, alone or in a batch; the stops come from a run without any."""
    byte, model = get_tokenizer("byte"), byte_model()
    prompts = [list(b"ab"), list("caf\u00e9".encode()), list(b"x")]
    options = {"seed": seed, "temperature": 0.9, "tokenizer": byte}
    free = generate(model, prompts, 60, **options)
    new = [row[len(p) :] for row, p in zip(free, prompts, strict=True)]
    runs = re.findall(rb"[ -~]{2}|[ -~]", bytes(i if i < 128 else 255 for i in new[0][20:]))
    ascii_run = max(runs, key=len).decode()
    stop = [ascii_run, new[1][30:33], [new[2][25]]]
    rows = generate(model, prompts, 60, stop=stop, **options)
    for p, ids, row in zip(prompts, new, rows, strict=True):
        text = bytes(i if i < 128 else 255 for i in ids)
        found = [(n, len(ascii_run)) for n in [text.find(ascii_run.encode())] if n >= 0]
        for one in stop[1:]:
            found += [(n, len(one)) for n in range(60) if ids[n : n + len(one)] == one][:1]
        # The stop that is complete first ends the row, at the place where that stop begins.
        first = min(found, key=lambda run: (sum(run), run[0]), default=(60, 0))
        assert row == p + ids[: first[0]]
        assert [*row[len(p) :]] == list(stream(model, p, 60, stop=stop, **options))
        assert row == generate(model, [p], 60, stop=stop, **options)[0]
    assert sorted(map(len, rows)) != sorted(map(len, free))


def test_a_stop_in_the_prompt_does_not_count(model: GPT) -> None:
    p = prompt(6)
    row = generate(model, [p], 10, temperature=0.0)[0]
    assert generate(model, [p], 10, temperature=0.0, stop=[p, p[-1:] + row[6:8]]) == [row]


def test_generation_ends_with_its_stops(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    row = generate(model, [prompt(4)], 20, temperature=0.0)[0]
    calls = count_steps(monkeypatch)
    stop = [row[4 + 6 : 4 + 8]]
    first = min(n for n in range(20) if row[4 + n : 6 + n] == stop[0])
    cut = generate(model, [prompt(4)], 500, temperature=0.0, stop=stop)[0]
    assert (cut, len(calls)) == (row[: 4 + first], first + 2)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_between_two_ids_the_caller_keeps_its_own_modes(training: bool) -> None:
    model = lively_model(dropout=0.5).train(training)
    wanted = generate(model, [prompt(3)], 12, seed=1)[0][3:]
    ids = stream(model, prompt(3), 12, seed=1)
    for n, i in enumerate(ids):
        assert i == wanted[n]
        assert model.training is training
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        # Training goes on while a stream is open.
        model(torch.tensor([[1, 2]])).sum().backward()
        if n == 6:
            break
    ids.close()
    assert model.training is training
    assert not torch.is_inference_mode_enabled()
    with pytest.raises(StopIteration):
        next(ids)


def test_streams_side_by_side(model: GPT) -> None:
    prompts = [prompt(3), prompt(12)]
    wanted = [row[len(p) :] for row, p in zip(generate(model, prompts, 12), prompts, strict=True)]
    streams = [stream(model.train(), p, 12) for p in prompts]
    assert [list(ids) for ids in zip(*zip(*streams, strict=True), strict=True)] == wanted
    assert model.training


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (([], 3), {}, ValueError, "prompt 0 is empty"),
        (([61], 3), {}, IndexError, "token id 61"),
        (([1], -1), {}, ValueError, "max_new_tokens must be an integer >= 0"),
        (([1], 3), {"top_p": 2.0}, ValueError, "top_p must be"),
        (([1], 3), {"repetition_penalty": 0}, ValueError, "repetition_penalty must be"),
        (([1], 3), {"stop": ""}, ValueError, "stop has an empty string|pass tokenizer"),
        (([1], 3), {"logprobs": 1}, ValueError, "logprobs must be True or False, got 1"),
        (([1], 3), {"num_beams": 2}, ValueError, "num_beams=2 cannot be streamed"),
        (("text", 3), {}, ValueError, "text goes through generate_text"),
    ],
)
def test_a_stream_refuses_when_it_is_called(
    model: GPT, args: tuple, options: dict, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        stream(model, *args, **options)
    if args[0] == [1] and "logprobs" not in options:
        with pytest.raises(error, match=message):
            stream_text(
                lively_model(vocab_size=257), get_tokenizer("byte"), "a", args[1], **options
            )


def test_unknown_and_unsupported_options(model: GPT) -> None:
    byte, of_bytes = get_tokenizer("byte"), lively_model(vocab_size=257)
    for name, message in (
        ("foo", "^there is no option 'foo'; there are temperature, top_k"),
        ("logprobs", "^logprobs works with ids, not with text; use generate or stream"),
    ):
        for function in (generate_text, stream_text):
            with pytest.raises(TypeError, match=message):
                function(of_bytes, byte, "a", 3, **{name: True})
    with pytest.raises(TypeError, match="^there is no option 'foo'"):
        stream(model, [1], 3, foo=1)


def test_nan_in_a_stream(model: GPT) -> None:
    with torch.no_grad():
        model.ln_f.weight[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        next(stream(model, [1, 2], 3))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("stops", [False, True], ids=["whole", "stopped"])
def test_streamed_text_equals_the_whole(seed: int, stops: bool) -> None:
    byte, model = get_tokenizer("byte"), byte_model()
    prompts = ["ab", "caf\u00e9 \u20ac", "<|endoftext|>"]
    options = {"seed": seed, "repetition_penalty": 1.1, "allowed_special": {"<|endoftext|>"}}
    if stops:
        free = generate_text(model, byte, prompts, 50, **options)
        cuts = (text[len(p) + 6 :][:2] for text, p in zip(free, prompts, strict=True))
        options["stop"] = [cut for cut in cuts if cut]
    whole = generate_text(model, byte, prompts, 50, **options)
    assert whole == [generate_text(model, byte, p, 50, **options) for p in prompts]
    for p, text in zip(prompts, whole, strict=True):
        assert text.startswith(p)
        pieces = list(stream_text(model, byte, p, 50, **options))
        assert "".join(pieces) == text[len(p) :]
        assert all(pieces)
        for one in options.get("stop", ()):
            assert one not in text[len(p) :]
    if stops:
        assert sum(map(len, whole)) < sum(map(len, free))


def test_beams_as_text() -> None:
    byte, model = get_tokenizer("byte"), byte_model()
    with torch.no_grad():  # only ASCII has a positive score, so there are 30 characters
        model.lm_head.weight[:0x21] = 0
        model.lm_head.weight[0x7F:] = 0
    free = generate_text(model, byte, "ab", 30, num_beams=3)
    ids = generate(model, [list(b"ab")], 30, num_beams=3, eos_id=byte.eot)[0]
    assert free == byte.decode(ids) and len(free) == 32
    stop = free[7]
    assert generate_text(model, byte, "ab", 30, num_beams=3, stop=stop)[2:].count(stop) == 0


def test_text_to_text() -> None:
    byte = get_tokenizer("byte")
    # The model has more ids than the tokenizer, which are drawn only if it is not known.
    model = lively_model(vocab_size=400)
    ids = generate(model, [byte.encode("ab")], 60, seed=2, eos_id=byte.eot)[0]
    assert max(ids) >= byte.n_vocab
    options = {"seed": 2, "eos_id": byte.eot, "tokenizer": byte}
    ids = generate(model, [byte.encode("ab")], 60, **options)[0]
    assert max(ids) < byte.n_vocab
    text = generate_text(model, byte, "ab", 60, seed=2)
    assert text == byte.decode([i for i in ids if i != byte.eot])
    assert text.startswith("ab")


@pytest.mark.parametrize("prompt", [5, None, [5], ["a", None], "\ud800", b"ab"], ids=repr)
def test_wrong_types_of_text(prompt: object) -> None:
    byte, model = get_tokenizer("byte"), byte_model()
    with pytest.raises(ValueError, match="must be a string|lone surrogate"):
        generate_text(model, byte, prompt, 3)
    if not isinstance(prompt, list):
        with pytest.raises(ValueError, match="must be a string|lone surrogate"):
            stream_text(model, byte, prompt, 3)
