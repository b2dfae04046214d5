"""`gptfast eval`: how well a model predicts text, and how it does on tasks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gptfast.cli.flags import Positional
from gptfast.cli.model_flags import Dtype, load
from gptfast.data.loader import create_dataloader
from gptfast.data.sources import load_part
from gptfast.data.token_files import Documents
from gptfast.evaluate.hellaswag import hellaswag
from gptfast.evaluate.loss import Score, loader_score, perplexity, sliding_score, text_score
from gptfast.model import GPT
from gptfast.tokenizer.bpe import Tokenizer

if TYPE_CHECKING:
    from gptfast.engine import Engine


@dataclass(frozen=True)
class Eval:
    """Measure a model's loss, perplexity and bits per byte on text, or its accuracy on tasks.

    gptfast eval runs/book --data other.txt

    gptfast eval gpt2 --data wikitext.txt --stride 512

    gptfast eval gpt2 --hellaswag hellaswag_val.jsonl

    gptfast eval gpt2 --tasks lambada_openai arc_easy
    """

    checkpoint: Positional[str]
    """A run, a checkpoint in it, a model in any form that `gptfast convert` reads, or gpt2."""
    data: tuple[str, ...] = ()
    """Text, .jsonl or token files, directories or globs; of prepared data, the part --part."""
    stride: int | None = None
    """Slide a window of --max-length by so many tokens, for a text as a whole, as transformers'
    recipe does (default: windows side by side, as training sees them)."""
    hellaswag: str | None = None
    """A .jsonl of contexts, endings and labels, as HellaSwag's."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness (needs pip install 'gptfast[lm-eval]')."""
    limit: int | None = None
    """Of each task the first so many examples."""
    part: Literal["train", "val", "test"] = "val"
    """Which part of prepared data: train, val or test."""
    batch_size: int = 8
    """Windows or examples per batch."""
    max_length: int | None = None
    """Tokens per window (default the model's block_size)."""
    tokenizer: str | None = None
    """gpt2, byte or a directory (default: the checkpoint's own)."""
    dtype: Dtype | None = None
    """Measure the engine with weights of fp32, bf16 or int8, on the CPU (default: a packed model's
    own, of others the model as it is)."""
    device: str = "auto"
    """cpu, cuda or auto."""

    def run(self) -> None:
        if not (self.data or self.hellaswag or self.tasks):
            raise ValueError("nothing to measure: name files (--data), --hellaswag or --tasks")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {self.batch_size}")
        model, tokenizer = load(
            self.checkpoint, self.tokenizer, self.device, self.dtype, engine=False
        )
        if self.tasks and not isinstance(model, GPT):
            raise ValueError("--tasks measures a model as it is: leave out --dtype")
        if self.data:
            score = self._score(model, tokenizer)
            print(
                f"loss {score.loss:.4f} nats per token, perplexity {perplexity(score.loss):.2f}, "
                f"{score.bits_per_byte:.4f} bits per byte"
            )
        if self.hellaswag:
            options = {"batch_size": self.batch_size, "limit": self.limit}
            found = hellaswag(model, tokenizer, self.hellaswag, **options)
            print(
                f"hellaswag: acc {found.acc:.4f}, acc_norm {found.acc_norm:.4f} "
                f"({found.examples:,} examples)"
            )
        if self.tasks:
            self._run_tasks(model, tokenizer)

    def _score(self, model: "GPT | Engine", tokenizer: Tokenizer) -> Score:
        T = model.config.block_size if self.max_length is None else self.max_length
        if not 1 <= T <= model.config.block_size:
            raise ValueError(
                f"max_length must be from 1 to block_size={model.config.block_size}, got {T}"
            )
        source = load_part(self.data, tokenizer, self.part)
        sizes = {"max_length": T, "batch_size": self.batch_size}
        if not isinstance(source, Documents):
            if self.stride is None:
                return text_score(model, source, tokenizer, **sizes)
            return sliding_score(model, source, tokenizer, stride=self.stride, **sizes)
        if self.stride is not None:
            raise ValueError("--stride slides over one text; prompts with completions are many")
        options = {"shuffle": False, "drop_last": False, "tokenizer": tokenizer}
        loader = create_dataloader(source, self.batch_size, T, T, **options)
        return loader_score(model, loader, tokenizer)

    def _run_tasks(self, model: GPT, tokenizer: Tokenizer) -> None:
        try:
            from lm_eval import simple_evaluate
            from lm_eval.utils import make_table

            from gptfast.evaluate.lm_eval import GPTFastLM
        except ImportError as error:
            raise ValueError(
                f"--tasks needs lm-evaluation-harness ({error}): pip install 'gptfast[lm-eval]'"
            ) from None
        options = {"batch_size": self.batch_size, "max_length": self.max_length}
        harness = GPTFastLM(model, tokenizer, **options)
        print(make_table(simple_evaluate(harness, tasks=list(self.tasks), limit=self.limit)))
