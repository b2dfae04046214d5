"""The replies of OpenAI's protocol: whole or in chunks, with log-probabilities and usage."""

import codecs
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gptfast
from gptfast.generation.decoder import SampledToken
from gptfast.serve.generation import Finish, Generation, Update
from gptfast.tokenizer.bpe import Tokenizer, end_of_text

_Utf8 = codecs.getincrementaldecoder("utf-8")
to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


class TokenNames:
    """The text of single tokens, as OpenAI writes them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.end = end_of_text(tokenizer)
        special = getattr(tokenizer, "special_tokens", {})
        self._special = {i: name for name, i in special.items()}
        self._texts: dict[int, str] = {}

    def bytes(self, i: int) -> bytes:
        """Return the bytes of a token; a special one's are those of its name."""
        if i in self._special:
            return self._special[i].encode()
        return self._tokenizer.decode_bytes([i]) if i < self._tokenizer.n_vocab else b""

    def text(self, i: int) -> str:
        r"""Return a token as text; one that is no whole characters as bytes:\xe2\x80."""
        text = self._texts.get(i)
        if text is None:
            text = self._texts[i] = _written(self.bytes(i))
        return text


def _written(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@dataclass
class Choice:
    """What is told of one generation, piece by piece or at its end."""

    index: int
    names: TokenNames
    wants_tokens: bool = True
    """Whether anybody asks for tokens and where they begin; otherwise only for the text."""
    echo: Sequence[int] = ()
    """The prompt, if it is repeated before the new text."""
    echo_text: str = ""
    finish: Finish | None = None
    text: str = ""
    tokens: list[SampledToken] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Where each token begins in the text, in characters."""

    def __post_init__(self) -> None:
        self._offset, self._decoder = 0, _Utf8("replace")

    def add(self, update: Update) -> None:
        """Take what became certain."""
        if self.echo and (update.prompt or update.text or update.tokens or update.finish):
            # The first token of a prompt follows nothing.
            self._add_tokens([SampledToken(self.echo[0]), *update.prompt])
            self.text += self.echo_text
            # The new text begins here, also after a prompt that ends within a character.
            self._offset, self._decoder = len(self.echo_text), _Utf8("replace")
            self.echo = ()
        self.text += update.text
        self._add_tokens(update.tokens)
        self.finish = update.finish or self.finish

    def _add_tokens(self, tokens: Sequence[SampledToken]) -> None:
        if not self.wants_tokens:
            return
        self.tokens += tokens
        for token in tokens:
            self.offsets.append(self._offset)
            if token.id != self.names.end:
                self._offset += len(self._decoder.decode(self.names.bytes(token.id)))

    def clear(self) -> None:
        """Forget what was told: it is in a chunk."""
        self.text, self.tokens, self.offsets = "", [], []

    def completion_logprobs(self) -> dict[str, Any]:
        """Return the log-probabilities of a completion: four lists with an entry per token."""
        return {
            "tokens": [self.names.text(token.id) for token in self.tokens],
            "token_logprobs": [token.logprob for token in self.tokens],
            "top_logprobs": [self._top(token) for token in self.tokens],
            "text_offset": self.offsets,
        }

    def _top(self, token: SampledToken) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        # The token itself is in, as at OpenAI: the likeliest and it are up to top + 1.
        pairs = [*(token.top_logprobs or ()), (token.id, token.logprob)]
        return {self.names.text(i): logprob for i, logprob in pairs}

    def chat_logprobs(self) -> dict[str, Any]:
        """Return the log-probabilities of a message: an object per token."""

        def described(i: int, logprob: float | None) -> dict[str, Any]:
            raw = self.names.bytes(i)
            return {"token": self.names.text(i), "logprob": logprob, "bytes": list(raw)}

        content = [
            described(token.id, token.logprob)
            | {"top_logprobs": [described(*pair) for pair in token.top_logprobs or ()]}
            for token in self.tokens
        ]
        return {"content": content, "refusal": None}


class Completions:
    """The form of replies to /v1/completions."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, wants_logprobs: bool) -> None:
        self.wants_logprobs = wants_logprobs

    def opening(self, index: int) -> Mapping[str, Any] | None:
        """Return the choice of a stream's first chunk, if there is one before any text."""
        return None

    def choice(self, choice: Choice, *, streamed: bool) -> dict[str, Any]:
        """Return a choice, whole or as part of a stream."""
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": choice.completion_logprobs() if self.wants_logprobs else None,
            "finish_reason": choice.finish,
        }


class Chat:
    """The form of replies to /v1/chat/completions."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, wants_logprobs: bool) -> None:
        self.wants_logprobs = wants_logprobs

    def opening(self, index: int) -> Mapping[str, Any] | None:
        """Return the choice of a stream's first chunk: the role."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def choice(self, choice: Choice, *, streamed: bool) -> dict[str, Any]:
        """Return a choice, whole or as part of a stream."""
        text: dict[str, Any]
        if streamed:
            text = {"delta": {"content": choice.text} if choice.text or not choice.finish else {}}
        else:
            text = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        logprobs = choice.chat_logprobs() if self.wants_logprobs else None
        return {
            "index": choice.index,
            **text,
            "logprobs": logprobs,
            "finish_reason": choice.finish,
        }


class Reply:
    """The parts of a reply that all its chunks share."""

    def __init__(self, form: Completions | Chat, model: str, dtype: str) -> None:
        self.form = form
        self._head = {
            "id": f"{form.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"gptfast-{gptfast.__version__}-{dtype}",
        }

    def whole(self, choices: Sequence[Choice], usage: Mapping[str, Any]) -> bytes:
        """Return a reply that is not streamed, in JSON."""
        # One by one: json lets no other thread run meanwhile.
        told = ", ".join(to_json(self.form.choice(choice, streamed=False)) for choice in choices)
        head = to_json({**self._head, "object": self.form.whole}).removesuffix("}")
        return f'{head}, "choices": [{told}], "usage": {to_json(usage)}}}'.encode()

    def chunk(self, choices: Sequence[Mapping[str, Any]], **usage: Any) -> dict[str, Any]:
        """Return a chunk of a stream."""
        return {**self._head, "object": self.form.part, "choices": choices, **usage}


def usage_of(generations: Sequence[Generation], n: int) -> dict[str, Any]:
    """Return the tokens of a request whose prompts have n choices each."""
    prompt = sum(one.n_prompt for one in generations[::n])
    new = sum(one.n_new for one in generations)
    cached = sum(one.n_cached for one in generations[::n])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
