"""The model card of a model that is published: what it learnt from, how long and how well.

Its facts come from the checkpoint that the weights are of. It names files without their folders:
where they lie on this machine is nobody's business.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptfast.config import GPTConfig
from gptfast.installed import DISTRIBUTION, commit, version
from gptfast.weights.checkpoint import recorded
from gptfast.weights.lazy_tensor import CheckpointError

CARD = "README.md"
ENVIRONMENT = "environment.json"
"""The file in a run's directory that says where it computes."""


@dataclass(frozen=True)
class Facts:
    """What a checkpoint records of its run."""

    data: tuple[str, ...]
    """The names of the files, directories or data sets; () for the text that Python brings."""
    steps: int
    targets: int
    """The number of tokens that the model was trained to predict."""
    loss: tuple[int, float] | None
    """A step, this one if it was evaluated, and its validation loss in nats per token."""
    started_from: str | None
    trained_with: str | None
    """The version of this package that trained it, and its commit, as far as they are known."""


def facts_of(checkpoint: Path) -> Facts | None:
    """Return what a checkpoint records of its run; None for a directory that is no checkpoint."""
    try:
        state = recorded(checkpoint)
    except CheckpointError:
        return None
    if state is None:
        return None
    config, step = state["config"], state["step"]
    best = state.get("best")
    measured = _loss_at(checkpoint.parent.parent / "metrics.jsonl", step)
    loss = (step, measured) if measured is not None else None
    if loss is None and best:
        loss = best["step"], best["val_loss"]
    data = tuple(map(without_folders, config.get("data") or ()))
    made = _made_with(checkpoint.parent.parent / ENVIRONMENT)
    return Facts(data, step, state["tokens"], loss, config.get("started_from"), made)


def without_folders(data: str) -> str:
    """Return a data set's name on the Hub as it is, and of a path its last part."""
    name = data.removeprefix("hf:")
    is_path = name == data or name.startswith(("/", ".", "~"))
    return Path(name).name if is_path else data


def _made_with(environment: Path) -> str | None:
    """Return what a run's environment.json says of this package."""
    try:
        values = json.loads(environment.read_text("utf-8"))
        return _release(values["gptfast"], values.get("commit", ""))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _release(version: str, commit: str) -> str:
    return f"{DISTRIBUTION} {version}" + (f", commit {commit}" if commit else "")


def _loss_at(metrics: Path, step: int) -> float | None:
    """Return the validation loss of a step in a run's metrics.jsonl, if it is there."""
    try:
        rows = map(json.loads, metrics.read_text("utf-8").splitlines())
        return next((row["val_loss"] for row in rows if row["step"] == step), None)
    except (OSError, ValueError, LookupError, TypeError):
        return None


def model_card(
    name: str,
    config: GPTConfig,
    parameters: int,
    facts: Facts | None,
    *,
    base: str | None = None,
) -> str:
    """Return the text of README.md.

    name: the repository, user/name. parameters: how many the model has, or the adapter. base: the
    model that an adapter is for; None for a whole model.
    """
    what = f"{parameters:,} parameters"
    shape = (
        f"{config.n_layer} layers of {config.n_embd:,} channels in {config.n_head} heads, "
        f"{config.vocab_size:,} tokens, a context of {config.block_size:,}"
    )
    kind = f"A GPT-2 with {what} ({shape})"
    if base is not None:
        kind = f"A LoRA adapter with {what} for `{_cell(base)}` (GPT-2: {shape})"
    rows = [*_rows(facts), ("Written by", _release(version(), commit()))]
    table = "".join(f"| {title} | {_cell(text)} |\n" for title, text in rows)
    return _signed(
        f"---\n{_front_matter(base)}---\n\n# {name.rpartition('/')[2]}\n\n"
        f"{kind}, made with gptfast.\n\n"
        f"| | |\n|---|---|\n{table}\n## How to load it\n\n{_loading(name, base)}"
    )


def _signed(text: str) -> str:
    """Return a card with a comment, by which `is_own` knows that nobody has changed it since."""
    return f"{text}\n<!-- gptfast {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_own(card: bytes) -> bool:
    """Return whether a README.md is a card that `model_card` made, as it was made."""
    text = card.decode("utf-8", "replace")
    return text == _signed(text.rpartition("\n<!-- gptfast ")[0])


def _rows(facts: Facts | None) -> list[tuple[str, str]]:
    if facts is None:
        return [("Training", "not on record")]
    rows = [("Data", ", ".join(facts.data) or "the English text that Python brings along")]
    if facts.started_from:
        rows.append(("Started from", facts.started_from))
    rows.append(("Steps", f"{facts.steps:,}, with {facts.targets:,} targets"))
    if facts.loss is not None:
        step, loss = facts.loss
        perplexity = math.exp(min(loss, 700.0))
        rows.append(
            (
                "Validation loss",
                f"{loss:.4f} nats per token (perplexity {perplexity:.1f}) at step {step:,}",
            )
        )
    if facts.trained_with:
        rows.append(("Trained with", facts.trained_with))
    return rows


def _cell(text: str) -> str:
    """Return a text as it can stand in a cell of a table of Markdown."""
    for sign in "\\`|<>[]":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def _front_matter(base: str | None) -> str:
    """Return the card's metadata, as YAML."""
    values: dict[str, Any] = {
        "library_name": "transformers" if base is None else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2", "gptfast"] + ([] if base is None else ["lora"]),
    }
    if base is not None:
        values["base_model"] = base
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items())


def _loading(name: str, base: str | None) -> str:
    """Return how transformers, peft and gptfast load it."""
    if base is None:
        theirs = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})\n"
        )
    else:
        theirs = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)})\n"
            f"model = PeftModel.from_pretrained(base, {json.dumps(name)})\n"
        )
    own = name.rpartition("/")[2]
    return (
        f"```python\n{theirs}```\n\nWith gptfast (from its sources, with the extra hub):\n\n"
        f"```sh\nhf download {name} --local-dir {own}\n"
        f'gptfast generate {own} --prompt "Once upon a time"\n```\n'
    )
