"""`gptfast download`: fetch GPT-2's weights."""

from dataclasses import dataclass
from typing import Literal

from gptfast.cli.flags import Positional


@dataclass(frozen=True)
class Download:
    """Download GPT-2's weights. Every command then takes the name, such as gpt2, as a model.

    The same command continues a download that was interrupted. The weights go into the cache
    directory: $GPTFAST_CACHE, or else gptfast in $XDG_CACHE_HOME or ~/.cache.

    gptfast download gpt2
    """

    name: Positional[Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]]
    """gpt2, gpt2-medium, gpt2-large or gpt2-xl, with 124M, 355M, 774M or 1558M parameters."""
    url: str | None = None
    """The address of a mirror of OpenAI's directories (default: OpenAI's server)."""

    def run(self) -> None:
        from gptfast.weights.download import OPENAI, download

        print(f"done: {download(self.name, url=self.url or OPENAI)}")
