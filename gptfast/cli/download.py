"""`gptfast download`: fetch GPT-2's weights."""

from dataclasses import dataclass
from typing import Literal

from gptfast.cli.flags import Positional


@dataclass(frozen=True)
class Download:
    """Fetch GPT-2 into the cache directory; then "gpt2" names it wherever a model is asked for.

    A download that was cut goes on where it stopped. The cache is $GPTFAST_CACHE, or gptfast in
    $XDG_CACHE_HOME or ~/.cache.

    gptfast download gpt2
    """

    name: Positional[Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]]
    """Which of OpenAI's four sizes: 124M, 355M, 774M or 1558M parameters."""
    url: str | None = None
    """The address of a mirror with OpenAI's directories (default: OpenAI's own)."""

    def run(self) -> None:
        from gptfast.weights.download import OPENAI, download

        print(f"done: {download(self.name, url=self.url or OPENAI)}")
