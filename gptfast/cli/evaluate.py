"""`gptfast eval`: measure how well a model predicts text and solves tasks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from gptfast.cli.conflicts import check_evaluation
from gptfast.cli.data_flags import Reading
from gptfast.cli.flags import Positional, UsageError
from gptfast.cli.model_flags import Device, Dtype, load
from gptfast.cli.ranges import MAX_THREADS, check_whole
from gptfast.cli.settings import with_tuples
from gptfast.cli.terminal import print_note
from gptfast.cli.threads import set_threads
from gptfast.data.loader import Examples, create_dataloader
from gptfast.data.sources import Source, load_part
from gptfast.data.token_files import Documents
from gptfast.data.tokens import check_rows
from gptfast.evaluate.hellaswag import hellaswag
from gptfast.evaluate.loss import (
    Score,
    loader_score,
    perplexity,
    rounding_cost,
    sliding_score,
    text_score,
    window_length,
)
from gptfast.model import GPT
from gptfast.tokenizer.bpe import Tokenizer
from gptfast.weights.packed import is_packed

if TYPE_CHECKING:
    from gptfast.engine import Engine


@dataclass(frozen=True)
class Eval(Reading):
    """Measure a model's loss, perplexity and bits per byte on text, or its accuracy on tasks.

    gptfast eval runs/book --data other.txt

    gptfast eval gpt2 --data wikitext.txt --stride 512

    gptfast eval gpt2 --hellaswag hellaswag_val.jsonl

    gptfast eval gpt2 --tasks lambada_openai arc_easy
    """

    checkpoint: Positional[str]
    """The model: a run directory, one of its checkpoints, a model in any format that `gptfast
    convert` reads or writes, or gpt2."""
    data: tuple[str, ...] = ()
    """The text to measure on: files of text or of records (.jsonl, .json, .csv, .parquet), token
    files, directories or globs of them, hf:NAME:SPLIT:FIELD for a data set of the datasets library,
    or - for standard input. Of data that `gptfast prepare` wrote, the part named by --part."""
    stride: int | None = None
    """Slide a window of --max-length over the text by this many tokens, as transformers' perplexity
    recipe does (default: windows side by side, as in training)."""
    hellaswag: str | None = None
    """A .jsonl file in HellaSwag's format: contexts, endings and labels."""
    tasks: tuple[str, ...] = ()
    """Names of tasks of lm-evaluation-harness (needs pip install lm_eval)."""
    limit: int | None = None
    """Use only this many examples of each task."""
    part: Literal["train", "val", "test"] = "val"
    """Which part of prepared data to measure."""
    batch_size: int = 8
    """Number of windows or examples per batch."""
    max_length: int | None = None
    """Number of tokens per window (default: the model's block_size)."""
    base: str | None = None
    """For an adapter: the model that it was trained beside (default: the one that it names)."""
    tokenizer: str | None = None
    """gpt2, byte, or a directory with a vocabulary's files (default: the checkpoint's)."""
    dtype: Dtype | None = None
    """Measure the engine with weights of this data type (default: the engine for a packed model,
    the PyTorch model for others)."""
    device: Device = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    threads: int | None = None
    """Number of threads (default: $OMP_NUM_THREADS, else one per core)."""
    set_first: ClassVar = (
        *("data", "stride", "hellaswag", "tasks", "part", "batch_size"),
        *("tokenizer", "dtype", "device"),
    )

    def __post_init__(self) -> None:
        check_whole(self, "batch_size", "max_length", "stride", "limit")
        check_whole(self, "threads", most=MAX_THREADS)

    @classmethod
    def from_given(cls, given: Mapping[str, Any]) -> Self:
        """Return the command with these flags. Raises UsageError for some that do not apply."""
        command = cls(**with_tuples(given))
        asked = {name for name in ("data", "hellaswag", "tasks") if getattr(command, name)}
        if not asked:
            raise UsageError("nothing to measure: give --data, --hellaswag or --tasks")
        check_evaluation(given.keys(), command.data, asked)
        return command

    def run(self) -> None:
        set_threads(self.threads)
        model, tokenizer = self._load(self.dtype)
        if self.tasks and not isinstance(model, GPT):
            raise ValueError("--tasks measures the PyTorch model: leave out --dtype")
        if self.data:
            source = self._source(model, tokenizer)
            score = self._score(model, tokenizer, source)
            print(
                f"loss {score.loss:.4f} nats per token, perplexity {perplexity(score.loss):.2f}, "
                f"{score.bits_per_byte:.4f} bits per byte"
            )
            if self.dtype == "int4" and not is_packed(self.checkpoint):
                plain, _ = self._load("fp32")
                cost = rounding_cost(score, self._score(plain, tokenizer, source, notes=False))
                print(f"int4 costs {cost}")
        if self.hellaswag:
            found = hellaswag(
                model,
                tokenizer,
                self.hellaswag,
                batch_size=self.batch_size,
                limit=self.limit,
            )
            print(
                f"hellaswag: acc {found.acc:.4f}, acc_norm {found.acc_norm:.4f} "
                f"({found.examples:,} examples)"
            )
        if self.tasks and isinstance(model, GPT):
            self._run_tasks(model, tokenizer)

    def _load(self, dtype: str | None) -> "tuple[GPT | Engine, Tokenizer]":
        where = (self.checkpoint, self.tokenizer, self.device, dtype)
        return load(*where, engine=False, base=self.base)

    def _source(self, model: "GPT | Engine", tokenizer: Tokenizer) -> Source:
        """Return what --data names."""
        window_length(self.max_length, model.config.block_size)
        source = load_part(self.data, tokenizer, self.part, **self.reading())
        check_rows(source, model.config.vocab_size, tokenizer, self.checkpoint)
        return source

    def _score(
        self, model: "GPT | Engine", tokenizer: Tokenizer, source: Source, *, notes: bool = True
    ) -> Score:
        """Return the losses on --data. notes: whether to say which examples are too long."""
        T = window_length(self.max_length, model.config.block_size)
        sizes = {"max_length": T, "batch_size": self.batch_size}
        if not isinstance(source, Documents):
            if self.stride is None:
                return text_score(model, source, tokenizer, **sizes)
            return sliding_score(model, source, tokenizer, stride=self.stride, **sizes)
        if self.stride is not None:
            raise ValueError("--stride needs one text, got prompts with completions: leave it out")
        loader = create_dataloader(
            source, self.batch_size, T, T, shuffle=False, drop_last=False, tokenizer=tokenizer
        )
        if notes and isinstance(loader.dataset, Examples):
            for line in loader.dataset.notes():
                print_note(line)
        return loader_score(model, loader, tokenizer)

    def _run_tasks(self, model: GPT, tokenizer: Tokenizer) -> None:
        """Run the tasks of lm-evaluation-harness and print its table."""
        try:
            from lm_eval import simple_evaluate
            from lm_eval.utils import make_table

            from gptfast.evaluate.lm_eval import GPTFastLM
        except ImportError as error:
            raise ValueError(
                f"--tasks needs lm-evaluation-harness ({error}): pip install lm_eval"
            ) from None
        harness = GPTFastLM(
            model, tokenizer, batch_size=self.batch_size, max_length=self.max_length
        )
        print(make_table(simple_evaluate(harness, tasks=list(self.tasks), limit=self.limit)))
