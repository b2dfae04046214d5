"""Test the model in lm-evaluation-harness: likelihoods against those by hand and those of its own
Hugging Face model, and a whole task."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    random_model,
)

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402

from gptfast import GPT, get_tokenizer  # noqa: E402
from gptfast.evaluate.lm_eval import GPTFastLM  # noqa: E402

BYTE = get_tokenizer("byte")
PAIRS = [("the value of", " a name"), ("", "x"), ("ab ", "c"), ("a" * 50, " tail")]
PAIRS += [(" ", "b"), ("q", "z" * 31)]


def request(kind: str, *args: Any) -> Instance:
    return Instance(kind, {}, args, 0)


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model(vocab_size=257, block_size=32, std=0.3).eval()


def log_likelihood(model: GPT, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    ids = (context + continuation)[-33:]
    with torch.no_grad():
        log_p = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    n = min(len(continuation), len(ids) - 1)
    rows, targets = log_p[-n:], torch.tensor(ids[-n:])
    total = rows.gather(1, targets[:, None]).sum().item()
    return total, bool((rows.argmax(-1) == targets).all())


@pytest.mark.parametrize("batch_size", [1, 2, "auto"])
def test_loglikelihood_by_hand(model: GPT, batch_size: int | str) -> None:
    harness = GPTFastLM(model, BYTE, batch_size=batch_size)
    greedy = BYTE.decode([int(model(torch.tensor([BYTE.encode("the v")]))[0, -1].argmax())])
    pairs = [*PAIRS, ("the v", greedy)]
    got = harness.loglikelihood([request("loglikelihood", *pair) for pair in pairs], True)
    for (context, continuation), (value, is_greedy) in zip(pairs, got, strict=True):
        kept = context.rstrip()
        moved = context[len(kept) :] + continuation
        ids = BYTE.encode(kept) or [BYTE.eot]
        wanted = log_likelihood(model, ids, BYTE.encode(moved))
        assert abs(value - wanted[0]) < 1e-4 * abs(wanted[0])
        assert is_greedy == wanted[1]
    assert got[-1][1] == (len(greedy.encode()) == 1)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 64, 100])
def test_rolling(model: GPT, n: int) -> None:
    """Every token is predicted once: the first from end-of-text, the last with a full window."""
    text = ("the value of a name " * 9)[:n]
    harness = GPTFastLM(model, BYTE, batch_size=3)
    (got,) = harness.loglikelihood_rolling([request("loglikelihood_rolling", text)], True)
    ids, total, done = [BYTE.eot, *BYTE.encode(text)], 0.0, 0
    while done < n:
        new = min(32, n - done)
        end = done + new
        window = ids[max(0, end - 32) : end + 1]
        total += log_likelihood(model, window[: len(window) - new], window[len(window) - new :])[0]
        done = end
    assert abs(got - total) < 1e-4 * abs(total)


def test_generate_until(model: GPT) -> None:
    from gptfast.generate import generate_text

    harness = GPTFastLM(model, BYTE)
    whole = generate_text(model, BYTE, "the v", 12, temperature=0.0)[5:]
    stop = whole[4:6]
    limit = {"max_gen_toks": 12}
    options = [limit, {"until": [stop], **limit}, {"until": stop, **limit}]
    got = harness.generate_until([request("generate_until", "the v", o) for o in options], True)
    assert got == [whole, whole[: whole.index(stop)], whole[: whole.index(stop)]]


def test_generate_until_draws(model: GPT) -> None:
    """Each draw has its own seed; temperature 0 is greedy; a context that is too long is cut."""
    harness = GPTFastLM(model, BYTE)

    def got(context: str, **options: Any) -> list[str]:
        return harness.generate_until([request("generate_until", context, options)] * 3, True)

    assert len(set(got("the v", do_sample=True, temperature=1.0, max_gen_toks=12))) == 3
    assert len(set(got("the v", temperature=0.0, max_gen_toks=12))) == 1
    assert got("the v", max_gen_toks=0) == [""] * 3
    # Like the harness's own models: the context loses its beginning, so that the rest fits.
    assert got("x" * 90 + "the value", max_gen_toks=23) == got("the value", max_gen_toks=23)
    assert got("", max_new_tokens=3) == got("<|endoftext|>", max_gen_toks=3)


def test_every_option_of_the_harness_counts(model: GPT) -> None:
    """Each is passed on, does nothing at its value, or is refused by name."""
    harness = GPTFastLM(model, BYTE)

    def got(**options: Any) -> str:
        options = {"max_gen_toks": 12, **options}
        return harness.generate_until([request("generate_until", "the v", options)], True)[0]

    greedy = got()
    assert got(num_beams=1, use_cache=True, length_penalty=1.0, do_sample=False) == greedy
    assert got(repetition_penalty=1.0) == greedy != got(repetition_penalty=50.0)
    assert got(do_sample=True, min_p=1.0) == greedy  # the likeliest token alone is left
    assert got(do_sample=True)
    for unknown in ({"num_beams": 2}, {"length_penalty": 0.5}, {"foo": 1}):
        (name,) = unknown
        with pytest.raises(ValueError, match=f"does not know {name}=.*leave it out"):
            got(**unknown)


@pytest.mark.parametrize(
    "off",
    [{"top_k": 0}, {"top_k": 0, "top_p": 1.0}, {"top_k": None, "top_p": 1}],
    ids=str,
)
def test_generation_without_truncation(model: GPT, off: dict[str, float]) -> None:
    """Tasks write top_k 0 for none, as transformers does."""

    def got(**options: object) -> str:
        asked = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 0.9, **options}
        harness = GPTFastLM(model, BYTE)
        return harness.generate_until([request("generate_until", "the v", asked)], True)[0]

    assert got(**off) == got()


def test_end_of_text_and_refused_continuations(model: GPT) -> None:
    harness = GPTFastLM(model, BYTE)
    assert harness.tok_encode("a<|endoftext|>b") == [97, 256, 98]
    for continuation, n in (("", 0), ("c" * 33, 33)):
        with pytest.raises(ValueError, match=f"has {n} tokens; 1 to 32 can be scored"):
            harness.loglikelihood([request("loglikelihood", "ab", continuation)], True)
    with pytest.raises(ValueError, match="max_length must be from 1 to block_size=32, got 33"):
        GPTFastLM(model, BYTE, max_length=33)


def test_as_the_harnesss_own_model(tmp_path: Path) -> None:
    """The harness's Hugging Face class gives the same numbers with these weights."""
    pytest.importorskip("tokenizers")
    from lm_eval.models.huggingface import HFLM

    from gptfast.data.embedded import embedded_text
    from gptfast.tokenizer.train import train_tokenizer

    tokenizer = train_tokenizer([embedded_text()[:9000]], 300, tmp_path / "vocabulary")
    model = random_model(vocab_size=tokenizer.n_vocab, block_size=32, n_embd=128, std=0.1)
    model.save_pretrained(tmp_path / "hf", tokenizer=tokenizer)
    theirs = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", batch_size=2, dtype="float32")
    ours = GPTFastLM(str(tmp_path / "hf"))
    requests = [request("loglikelihood", *pair) for pair in PAIRS if pair[0] != " "]
    for a, b in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert abs(a[0] - b[0]) < 1e-3 and a[1] == b[1]
    rolling = [request("loglikelihood_rolling", embedded_text()[i : i + 200]) for i in (0, 777)]
    a, b = ours.loglikelihood_rolling(rolling), theirs.loglikelihood_rolling(rolling)
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-2


def test_a_task(model: GPT, tmp_path: Path) -> None:
    """The harness's evaluator runs a task that is made of local files."""
    from lm_eval.tasks import TaskManager

    data = [{"q": "the value", "choices": [" of", " zz"], "gold": i % 2} for i in range(6)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, data)))
    config = f"""
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}, cache_dir: {tmp_path}/cache}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""
    (tmp_path / "tiny.yaml").write_text(config)
    results = lm_eval.simple_evaluate(
        GPTFastLM(model, BYTE),
        tasks=["tiny"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert results["results"]["tiny"]["acc,none"] == 0.5
