"""`gptfast serve`: OpenAI's protocol over HTTP, and a page to try a model on."""

import asyncio
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gptfast.cli.flags import Positional, UsageError
from gptfast.cli.generate import unescaped
from gptfast.cli.model_flags import (
    NEEDS_ENGINE,
    Device,
    Dtype,
    check_settings,
    draft_engine,
    load,
    new_seed,
)
from gptfast.cli.ranges import MAX_THREADS, check_whole
from gptfast.cli.terminal import print_note
from gptfast.cli.threads import set_threads
from gptfast.generation.conversation import QUESTIONS, Template
from gptfast.installed import DISTRIBUTION
from gptfast.serve.limits import Defaults, Limits

if TYPE_CHECKING:
    from gptfast.serve.model import Model
    from gptfast.serve.service import Service

MAX_PORT = 2**16 - 1
MODULES = ("fastapi", "uvicorn", "prometheus_client")


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a model over HTTP to clients of OpenAI's protocol, with a page to try it on.

    It answers /v1/completions, /v1/chat/completions and more, which docs/serving.md lists; the page
    is at /. Many requests are computed together, and a request with a seed gets the same text
    whatever else runs. It needs FastAPI: pip install 'gptfast-torch[serve]'.

    SIGTERM and Ctrl-C let running requests end. SIGHUP reads the model again; requests that run
    end with the one that they began with.

    gptfast serve runs/book

    gptfast serve gpt2 --dtype int8 --port 8080

    gptfast serve gpt2 --host 0.0.0.0 --api-key-file keys.txt
    """

    checkpoint: Positional[str]
    """The model: a run directory, one of its checkpoints, a model in any format that `gptfast
    convert` reads or writes, or gpt2."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is all of this machine's, and needs --api-key-file."""
    port: int = 8000
    """Port to listen at; 0 takes a free one, which is printed."""
    model_name: str | None = None
    """The model's name for clients (default: the last part of its path)."""
    api_key_file: str | None = None
    """A file with a key on each line. Requests must send one of them."""
    allow_no_key: bool = False
    """Listen beyond this machine without keys, for example behind a proxy that checks them."""
    cors_origin: tuple[str, ...] = ()
    """Origins whose pages may call this server, for example https://example.org. By default no
    page but this server's own may."""
    template: str = QUESTIONS
    """How a chat is written as text, as in `gptfast chat`: {prompt} stands for a message."""
    temperature: float = Defaults.temperature
    """What requests that do not say take; so do --top-k, --top-p, --min-p and
    --repetition-penalty."""
    top_k: int | None = Defaults.top_k
    """See --temperature."""
    top_p: float | None = Defaults.top_p
    """See --temperature."""
    min_p: float | None = Defaults.min_p
    """See --temperature."""
    repetition_penalty: float = Defaults.repetition_penalty
    """See --temperature."""
    max_batch: int = 16
    """How many texts are computed at a time; the others wait."""
    max_queue: int = Limits.max_queue
    """How many texts may wait; more requests get the error 429."""
    max_choices: int = Limits.max_choices
    """How many texts a request may ask for: its prompts times its n."""
    max_prompt_tokens: int | None = Limits.max_prompt_tokens
    """How long a prompt may be (default: as long as the model's context)."""
    max_new_tokens: int | None = Limits.max_new_tokens
    """How many new tokens a text may have (default: as many as fit into the model's context)."""
    max_body: int = Limits.max_body_bytes
    """How many bytes a request may have."""
    timeout: float = Limits.timeout_s
    """Seconds after which a request is ended."""
    drain_timeout: float = 60.0
    """Seconds that running requests have after SIGTERM."""
    dtype: Dtype | None = None
    """Data type of the weights (default: that of a packed model, else fp32)."""
    lookup: bool = False
    """Prompt lookup: guess the next tokens from what followed the same tokens earlier. The text
    stays the same and is faster where it repeats itself."""
    draft: str | None = None
    """A smaller model with the same vocabulary that guesses the next tokens. The text stays the
    same and is faster where the guesses are right."""
    base: str | None = None
    """For an adapter: the model that it was trained beside (default: the one that it names)."""
    tokenizer: str | None = None
    """gpt2, byte, or a directory with a vocabulary's files (default: the checkpoint's)."""
    device: Device = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    threads: int | None = None
    """Number of threads (default: $OMP_NUM_THREADS, else one per core)."""
    set_first: ClassVar = (
        *("host", "port", "model_name", "api_key_file", "cors_origin", "template"),
        *("max_batch", "max_new_tokens", "dtype", "device"),
    )

    def __post_init__(self) -> None:
        check_whole(self, "threads", most=MAX_THREADS)
        check_whole(self, "port", least=0, most=MAX_PORT)
        check_whole(self, "max_queue", least=0)
        for name in ("max_batch", "max_choices", "max_prompt_tokens", "max_new_tokens", "max_body"):
            check_whole(self, name)

    def run(self) -> None:
        self._check()
        from gptfast.serve.run import bound_socket, is_loopback, serve

        keys = self._keys()
        if not keys and not is_loopback(self.host) and not self.allow_no_key:
            raise UsageError(
                f"--host {self.host} can be reached from elsewhere: give --api-key-file, or "
                "--allow-no-key if something in front of this server checks who asks"
            )
        set_threads(self.threads)
        with bound_socket(self.host, self.port) as sock:
            asyncio.run(
                serve(
                    self._service,
                    sock,
                    keys=keys,
                    cors_origins=self.cors_origin,
                    drain_timeout_s=self.drain_timeout,
                    say=print_note,
                )
            )

    def _check(self) -> None:
        """Raise an error for flags out of range and for missing packages."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "lookup")
        settings = {name: getattr(self, name) for name in names}
        check_settings({**settings, "seed": 0, "max_new_tokens": 1})
        if self.lookup and self.draft is not None:
            raise UsageError("--lookup and --draft do not go together; leave one out")
        for name in ("timeout", "drain_timeout"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 0 seconds")
        try:
            Template.parse(unescaped(self.template))
        except ValueError as error:
            raise UsageError(str(error)) from None
        for module in MODULES:
            if importlib.util.find_spec(module) is None:
                raise ImportError(
                    f"gptfast serve needs {module}: pip install '{DISTRIBUTION}[serve]'"
                )

    def _keys(self) -> list[str]:
        """Return the keys of --api-key-file, whose empty lines do not count."""
        if self.api_key_file is None:
            return []
        try:
            text = Path(self.api_key_file).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{self.api_key_file} is not UTF-8 text") from None
        except OSError as error:
            raise ValueError(
                f"cannot read --api-key-file {self.api_key_file}: {error.strerror}; name a file "
                "with a key on each line"
            ) from None
        keys = [line.strip() for line in text.splitlines() if line.strip()]
        if not keys:
            raise ValueError(f"{self.api_key_file} has no key; write one on each line")
        if bad := [key for key in keys if not (key.isascii() and key.isprintable())]:
            place = keys.index(bad[0]) + 1
            raise ValueError(f"key {place} of {self.api_key_file} has other characters than ASCII")
        return keys

    def _service(self, on_failure: Callable[[str], None]) -> "Service":
        from gptfast.serve.service import Service

        return Service(
            self.model_name or Path(self.checkpoint).resolve().name,
            self._model,
            template=Template.parse(unescaped(self.template)),
            limits=Limits(
                max_queue=self.max_queue,
                max_choices=self.max_choices,
                max_prompt_tokens=self.max_prompt_tokens,
                max_new_tokens=self.max_new_tokens,
                max_body_bytes=self.max_body,
                timeout_s=self.timeout,
            ),
            defaults=Defaults(
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
            ),
            new_seed=new_seed,
            on_failure=on_failure,
        )

    def _model(self) -> "Model":
        """Return the model, read from its files."""
        from gptfast.engine import Engine
        from gptfast.serve.model import Model

        engine, tokenizer = load(
            self.checkpoint, self.tokenizer, self.device, self.dtype, base=self.base
        )
        if not isinstance(engine, Engine):
            raise ValueError(f"gptfast serve {NEEDS_ENGINE}")
        engine.max_batch = self.max_batch
        guesses: dict[str, Any] = {"lookup": True} if self.lookup else {}
        if self.draft is not None:
            where = (self.checkpoint, self.device, self.tokenizer)
            guesses["draft"] = draft_engine(self.draft, self.dtype, *where)
        return Model(engine, tokenizer, guesses)
