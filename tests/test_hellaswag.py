"""Compare HellaSwag's accuracies with llm.c's row-by-row count, and test invalid lines."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    random_model,
)

from gptfast import GPT, get_tokenizer
from gptfast.evaluate.hellaswag import hellaswag

BYTE = get_tokenizer("byte")
WORDS = "the value of a name is what it was bound to last in that scope and no other".split()


def examples(n: int) -> list[dict]:
    """Return contexts and endings of all lengths; some labels are text, as in some copies."""
    out = []
    for i in range(n):
        endings = [
            " ".join(WORDS[(i + j) % 9 : (i + j) % 9 + 1 + (3 * j + i) % 7]) for j in range(4)
        ]
        label = (i * 7) % 4
        context = " ".join(WORDS[i % 5 : i % 5 + 4])
        out.append({"ctx": context, "endings": endings, "label": str(label) if i % 2 else label})
    return out


def by_hand(model: GPT, lines: list[dict]) -> tuple[float, float]:
    """Score one ending at a time, with its own logits and mask."""
    right = [0, 0]
    for line in lines:
        sums, means = [], []
        for ending in line["endings"]:
            context, end = BYTE.encode(line["ctx"]), BYTE.encode(" " + ending)
            ids = torch.tensor([context + end])
            with torch.no_grad():
                losses = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="none")
            losses = losses[len(context) - 1 :]
            assert len(losses) == len(end)
            sums.append(losses.sum().item())
            means.append(losses.mean().item())
        right[0] += sums.index(min(sums)) == int(line["label"])
        right[1] += means.index(min(means)) == int(line["label"])
    return right[0] / len(lines), right[1] / len(lines)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_as_llmc_counts(batch_size: int, tmp_path: Path) -> None:
    model, lines = random_model(vocab_size=257, block_size=128).eval(), examples(25)
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = hellaswag(model, BYTE, path, batch_size=batch_size)
    wanted = by_hand(model, lines)
    assert wanted[0] != wanted[1]
    assert (found.examples, found.acc, found.acc_norm) == (25, *wanted)


def test_a_long_context_loses_its_beginning(tmp_path: Path) -> None:
    model = random_model(vocab_size=257, block_size=16).eval()
    line = {"ctx": "y" * 40 + "ab", "endings": ["c" * 5, "d" * 5], "label": 1}
    (tmp_path / "long.jsonl").write_text(json.dumps(line))
    ids = [torch.tensor([BYTE.encode("y" * 9 + "ab " + e)]) for e in line["endings"]]
    assert ids[0].shape[1] == 17
    with torch.no_grad():
        sums = [
            F.cross_entropy(model(x[:, :-1])[0, -6:], x[0, -6:], reduction="sum").item()
            for x in ids
        ]
    found = hellaswag(model, BYTE, tmp_path / "long.jsonl")
    assert found.acc == (sums[1] < sums[0])


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "1",
        '{"ctx": "a", "endings": ["b", "c"]}',
        '{"ctx": "a", "endings": ["b", "c"], "label": 2}',
        '{"ctx": "a", "endings": ["b", "c"], "label": -1}',
        '{"ctx": "a", "endings": ["b", "c"], "label": true}',
        '{"ctx": "a", "endings": ["b"], "label": 0}',
        '{"ctx": "a", "endings": ["b", 3], "label": 0}',
        '{"ctx": null, "endings": ["b", "c"], "label": 0}',
        '{"ctx": "a", "endings": ["", "c"], "label": 0}',
        "\udcff",
        "[" * 100_000,
    ],
)
def test_a_line_that_is_no_example(line: str, tmp_path: Path) -> None:
    text = (
        "\ufeff" + json.dumps(examples(1)[0]) + "\n" + line
    )  # a byte-order mark, which some editors write, is accepted
    (tmp_path / "x.jsonl").write_text(text, "utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match="x.jsonl, line 2: not"):
        hellaswag(random_model(vocab_size=257), BYTE, tmp_path / "x.jsonl")


def test_nothing_to_measure(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="x.jsonl has no examples"):
        hellaswag(random_model(vocab_size=257), BYTE, tmp_path / "x.jsonl")
    line = {"ctx": "", "endings": ["a", "b"], "label": 0}
    (tmp_path / "x.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match="empty context"):
        hellaswag(random_model(vocab_size=257), BYTE, tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got 0"):
        hellaswag(random_model(vocab_size=257), BYTE, tmp_path / "x.jsonl", batch_size=0)
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, examples(3))))
    assert (
        hellaswag(random_model(vocab_size=257), BYTE, tmp_path / "x.jsonl", limit=2).examples == 2
    )
    broken = random_model(vocab_size=257)
    broken.ln_f.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="losses are not finite"):
        hellaswag(broken, BYTE, tmp_path / "x.jsonl")
