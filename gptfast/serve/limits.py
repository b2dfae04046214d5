"""What a client may ask a server for, and the values of what a request leaves out."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """How much a client may ask for."""

    max_queue: int = 256
    """Generations that may wait."""
    max_choices: int = 128
    """Generations of one request: its prompts times its n."""
    max_prompt_tokens: int | None = None
    """None: as many as fit into block_size."""
    max_new_tokens: int | None = None
    """None: as many as fit into block_size after the prompt."""
    max_body_bytes: int = 2**20
    timeout_s: float = 600.0
    """Seconds from a request's arrival to its end."""


@dataclass
class Defaults:
    """The values of what a request leaves out. Its seed is another one each time."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
