"""`gptfast convert` and `gptfast download`: GPT-2's weights into another form, and from afar."""

from dataclasses import dataclass
from typing import Literal

import torch
import tyro

from gptfast.weights.convert import check, format_of, save
from gptfast.weights.load import load_model

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Convert:
    """Write a model in another form. What SRC is, is seen from its content.

    SRC may be OpenAI's directory, a directory or file of transformers, nanoGPT's ckpt.pt, llm.c's
    .bin, the .pth of Raschka's book, a run or checkpoint of gptfast, or gpt2 if it was downloaded.

    gptfast convert models/124M gpt2-transformers

    gptfast convert gpt2 gpt2_124M.bin --dtype bf16
    """

    src: tyro.conf.Positional[str]
    """The model to read."""
    dst: tyro.conf.Positional[str]
    """The file or directory to write; it must not be there yet."""
    to: Literal["transformers", "llm.c", "nanogpt", "book"] | None = None
    """The form (default by DST's suffix: .bin llm.c, .pt nanogpt, .pth book, else transformers)."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Round the weights to it (default: as they are)."""
    n_head: int | None = None
    """Heads per block, where SRC does not tell (the book's; default 64 channels each)."""

    def run(self) -> None:
        check(self.dst, self.to)
        model = load_model(self.src, self.n_head)
        if self.dtype is not None:
            model.to(_DTYPES[self.dtype])
        save(model, self.dst, self.to)
        n = sum(p.numel() for p in model.parameters())
        print(f"done: {n:,} parameters in {self.dst} ({self.to or format_of(self.dst)})")


@dataclass(frozen=True)
class Download:
    """Fetch GPT-2 into the cache directory; then "gpt2" names it wherever a model is asked for.

    A download that was cut goes on where it stopped. The cache is $GPTFAST_CACHE, or gptfast in
    $XDG_CACHE_HOME or ~/.cache.

    gptfast download gpt2
    """

    name: tyro.conf.Positional[Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]]
    """Which of OpenAI's four sizes: 124M, 355M, 774M or 1558M parameters."""
    url: str | None = None
    """The address of a mirror with OpenAI's directories (default: OpenAI's own)."""

    def run(self) -> None:
        from gptfast.weights.download import OPENAI, download

        print(f"done: {download(self.name, url=self.url or OPENAI)}")
