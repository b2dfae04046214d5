"""The requests of OpenAI's protocol, as pydantic checks them, and its errors.

A field that is not known is refused, as OpenAI does, and so is a known one that asks for what this
server does not do. Fields that change no text are taken and ignored.

A body of megabytes can hold a million mistakes, and none may cost more than the first: of a list
only the first wrong entry is looked at, and mappings are short.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

T = TypeVar("T")
INT64 = 2**63 - 1
MAX_PROMPTS = 2**14
"""Prompts of a request, which --max-choices bounds further."""
MAX_MESSAGES = 2048
"""As many as at OpenAI."""
MAX_STOPS, MAX_STOP_LENGTH = 64, 1000
"""Stop strings of a request, and the characters of each. All are looked for at each token."""
MAX_BIASES = 1024
MAX_PENALTY = 100.0
"""The largest repetition penalty; the smallest is 1 / MAX_PENALTY. No logit overflows by it."""
MAX_METADATA = 16
"""As many entries as at OpenAI."""


def _short(name: str, most: int) -> BeforeValidator:
    """Return a check that a mapping has at most so many entries, before they are looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, Mapping) and len(value) > most:
            raise ValueError(f"{name} must have at most {most} entries, got {len(value)}")
        return value

    return BeforeValidator(check)


List = Annotated[list[T], Field(fail_fast=True)]
Prompts = Annotated[List[T], Field(max_length=MAX_PROMPTS)]
Seed = Annotated[int, Field(ge=-(2**63), le=INT64)]
Count = Annotated[int, Field(ge=0, le=INT64)]
StopText = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
Bias = Annotated[float, Field(ge=-100, le=100)]
FORMS = {
    "prompt": "a string, a list of strings, a list of token ids or a list of lists of token ids: "
    f"at most {MAX_PROMPTS} prompts",
    "stop": f"a string or a list of strings: at most {MAX_STOPS}, of at most {MAX_STOP_LENGTH} "
    "characters each",
    "content": "a string or a list of parts {'type': 'text', 'text': ...}",
    "tool_choice": "left out: this server has no tools",
}
"""What fields of several types may be."""


class ApiError(Exception):
    """An error with its HTTP status, for the client. Its message names value and remedy."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class ErrorDetail(BaseModel):
    """What was wrong, and what to do."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """The body of every reply with a status of 400 and above."""

    error: ErrorDetail


class Strict(BaseModel):
    """A part of a request: no unknown fields, no text for numbers, no infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, data: Any) -> Any:
        """Keep only the first of the fields that are not known: each one would be an error."""
        if not isinstance(data, dict):
            return data
        unknown = [name for name in data if name not in cls.model_fields]
        dropped = set(unknown[1:])
        return {name: value for name, value in data.items() if name not in dropped}


class StreamOptions(Strict):
    """What a stream holds besides the choices."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class Common(Strict):
    """The fields of completions and chat completions."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=INT64)] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: StopText | Annotated[List[StopText], Field(max_length=MAX_STOPS)] | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Annotated[dict[str, Bias] | None, _short("logit_bias", MAX_BIASES)] = None
    # Extensions, named as in vLLM.
    top_k: Annotated[int, Field(ge=-1, le=INT64)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1 / MAX_PENALTY, le=MAX_PENALTY)] | None = None
    ignore_eos: bool | None = None
    # Known, and refused unless they ask for nothing.
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    # Known, and ignored: they change no text.
    user: str | None = None

    def refused(self) -> Sequence[tuple[str, str]]:
        """Return the fields that ask for what this server does not do, each with a remedy."""
        instead = "leave it out, or use repetition_penalty"
        return [
            (name, instead)
            for name in ("presence_penalty", "frequency_penalty")
            if getattr(self, name)
        ]


class CompletionRequest(Common):
    """POST /v1/completions."""

    prompt: str | Prompts[str] | List[int] | Prompts[List[int]] = ""
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None
    suffix: str | None = None

    def refused(self) -> Sequence[tuple[str, str]]:
        found = [*super().refused()]
        if self.suffix:
            found.append(("suffix", "leave it out: a GPT continues a text, it fills no gap"))
        if self.best_of is not None and self.best_of != (self.n or 1):
            found.append(("best_of", "leave it out, ask for n and logprobs, and choose"))
        return found


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | List[TextPart] | None = None
    name: str | None = None
    # What OpenAI's client has in a reply that is sent back as it is.
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    @property
    def text(self) -> str:
        """The text of its parts."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ResponseFormat(Strict):
    """The form of a reply. What others than text have besides the type is not looked at."""

    model_config = ConfigDict(extra="ignore")
    type: str


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: Annotated[List[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[Any] | None = None
    modalities: List[str] | None = None
    store: bool | None = None
    metadata: Annotated[dict[str, str] | None, _short("metadata", MAX_METADATA)] = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def refused(self) -> Sequence[tuple[str, str]]:
        found = [*super().refused()]
        tools = [name for name in ("tools", "functions") if getattr(self, name)]
        if self.tool_choice not in (None, "none", "auto"):
            tools.append("tool_choice")
        found += [(name, "leave it out: a GPT-2 calls no tools") for name in tools]
        if self.response_format is not None and self.response_format.type != "text":
            found.append(("response_format", "leave it out: replies are plain text"))
        if self.modalities not in (None, ["text"]):
            found.append(("modalities", "leave it out: replies are text"))
        return found


class TokenizeRequest(Strict):
    """POST /tokenize, as vLLM has it."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeReply(BaseModel):
    """The reply of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Strict):
    """POST /detokenize, as vLLM has it."""

    model: str | None = None
    tokens: List[int]


class DetokenizeReply(BaseModel):
    """The reply of POST /detokenize."""

    prompt: str


def check_refused(request: Common) -> None:
    """Raise ApiError for a field that asks for what this server does not do."""
    for name, remedy in request.refused():
        raise ApiError(400, f"{name} is not supported; {remedy}", param=name)
    if request.stream_options is not None and not request.stream:
        raise ApiError(
            400, "stream_options needs stream: true; set it or leave it out", param="stream_options"
        )


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return pydantic's errors about a request as one in OpenAI's shape: that of the first field.

    The values of the request are not repeated.
    """
    first = errors[0]
    path = [part for part in first["loc"] if part != "body"]
    if first["type"] == "extra_forbidden":
        name = ".".join(map(str, path))
        return ApiError(
            400, f"Unrecognized request argument supplied: {name:.200}", param=name[:200]
        )
    if first["type"] in ("json_invalid", "model_attributes_type", "missing") and (
        not path or first["type"] == "json_invalid"
    ):
        return ApiError(400, "the body must be a JSON object, sent as application/json")
    if not path:
        return ApiError(400, f"the body: {_plain(first['msg'])}")
    # Of a union, the path goes on with the type that was tried.
    fields = [part for n, part in enumerate(path) if n == 0 or _is_name(path, n)]
    name = ".".join(map(str, fields))
    form = FORMS.get(str(fields[-1]))
    text = f"must be {form}" if form else _plain(first["msg"])
    return ApiError(400, f"{name}: {text}", param=name)


def _is_name(path: Sequence[Any], n: int) -> bool:
    """Return whether a part of a path is a field or an index: not the name of a type."""
    part = path[n]
    above = [one for one in path[:n] if isinstance(one, str)]
    if above and above[-1] in FORMS:
        return False
    return isinstance(part, int) or part.isidentifier()


def _plain(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
