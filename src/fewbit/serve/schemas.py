"""What clients may send, as pydantic models: OpenAI's fields, and `top_k`, `min_p`, `repetition_penalty`, `ignore_eos`.

A field that would change the answer in a way the server cannot follow is refused unless its value asks for nothing;
one that is only for OpenAI's accounts and caches is dropped.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Container, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator
from pydantic_core import PydanticCustomError

from fewbit.runtime.sampling import LEAST_PENALTY, MAX_LOGPROBS, MAX_STOPS, SamplingParams
from fewbit.serve.api_errors import ApiError

MOST = 1_000_000
SEEDS = 2**63
# More parts would take the server longer to look at than anybody has use for; a request's bytes alone allow many more.
MOST_PROMPTS = 1024
MOST_MESSAGES = 10_000

IGNORED = frozenset(
    {"metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "user"}
)

# Of each refused field, the values that ask for nothing (None always does), and what to do instead.
Refused = Mapping[str, tuple[tuple[Any, ...], str]]
REFUSED: Refused = {
    "frequency_penalty": ((0,), "use repetition_penalty"),
    "presence_penalty": ((0,), "use repetition_penalty"),
    "logit_bias": (({},), "leave it out"),
    "store": ((False,), "keep the answers yourself"),
}
REFUSED_COMPLETION: Refused = {
    **REFUSED,
    "best_of": ((1,), "use n and logprobs"),
    "echo": ((False,), "put the prompt before the text yourself"),
    "suffix": (("",), "leave it out"),
}
REFUSED_CHAT: Refused = {
    **REFUSED,
    "audio": ((), "this server speaks text only"),
    "function_call": (("none", "auto"), "leave it out"),
    "functions": (([],), "describe them in the system message"),
    "modalities": ((["text"],), "this server speaks text only"),
    "prediction": ((), "leave it out"),
    "reasoning_effort": (("none",), "say it in the system message"),
    "response_format": (({"type": "text"},), "ask for the format in the system message"),
    "tool_choice": (("none", "auto"), "leave it out"),
    "tools": (([],), "describe them in the system message"),
    "verbosity": ((), "say it in the system message"),
    "web_search_options": ((), "leave it out"),
}


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("invalid_value", message)


def _whole(text: str) -> str:
    """JSON can spell halves of UTF-16 pairs, which no tokenizer takes."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise _wrong("the text holds half of a UTF-16 pair, which is no character")
    return text


def _stops(value: Any) -> Any:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise _wrong("give a string or a list of strings, none of them empty")
    if len(stops) > MAX_STOPS:
        raise _wrong(f"at most {MAX_STOPS} stop strings")
    return stops


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in value)


def _prompts(value: Any) -> Any:
    prompts = [value] if isinstance(value, str) or (value and _is_ids(value)) else value
    if isinstance(prompts, list) and len(prompts) > MOST_PROMPTS:
        raise _wrong(f"at most {MOST_PROMPTS} prompts")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) or _is_ids(prompt) for prompt in prompts):
        raise _wrong("give a string, a list of token ids, or a list of either")
    if not prompts:
        raise _wrong("give at least one prompt")
    return prompts


def _turns(value: Any) -> Any:
    if isinstance(value, list) and len(value) > MOST_MESSAGES:
        raise _wrong(f"at most {MOST_MESSAGES} messages")
    return value


def _one_unknown(data: Any, known: Container[str]) -> Any:
    """Only the first of the fields that nobody knows: pydantic complains of each, and a request may hold 100 000."""
    if not isinstance(data, dict):
        return data
    first = next((key for key in data if key not in known), None)
    return {key: value for key, value in data.items() if key in known or key == first}


def _content(value: Any) -> Any:
    """Text, or parts of text put together."""
    if not isinstance(value, list):
        return value
    text = ""
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise _wrong("only parts of the type 'text' are taken")
        if not isinstance(part.get("text"), str):
            raise _wrong("a part of the type 'text' has a string 'text'")
        text += part["text"]
    return text


Text = Annotated[str, AfterValidator(_whole)]


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


Stops = Annotated[list[Text], BeforeValidator(_stops, json_schema_input_type=str | list[str] | None)]
Prompts = Annotated[
    list[Text | list[int]],
    FailFast(),
    BeforeValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
Content = Annotated[Text, BeforeValidator(_content, json_schema_input_type=str | list[TextPart])]


class Message(BaseModel):
    """One turn of a chat. `name` is taken and not used; an earlier answer may be sent back as it came."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields = cls.model_fields
        return _one_unknown(
            {key: value for key, value in data.items() if key in fields or value not in (None, [])}, fields
        )

    def for_template(self) -> dict[str, str]:
        """The message as chat templates take it: they know no developers, whose place the system has."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False

    @model_validator(mode="before")
    @classmethod
    def _shorten(cls, data: Any) -> Any:
        return _one_unknown(data, cls.model_fields)


class GenerationRequest(BaseModel):
    """What both endpoints take. `None` means the default everywhere, as with OpenAI."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    refused: ClassVar[Refused] = REFUSED

    model: Text | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MOST)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MOST)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=LEAST_PENALTY, le=10)] | None = None
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Stops = Field(default_factory=list)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, (neutral, remedy) in cls.refused.items():
            if data.get(name) is not None and data[name] not in neutral:
                raise ApiError(
                    400, f"this server cannot follow '{name}'; {remedy}", code="unsupported_parameter", param=name
                )
        meant = {key: value for key, value in data.items() if key not in cls.refused and key not in IGNORED}
        return _one_unknown(meant, cls.model_fields)

    @model_validator(mode="after")
    def _check_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400, "'stream_options' goes with stream: true only", code="invalid_value", param="stream_options"
            )
        return self

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @abstractmethod
    def token_limit(self) -> int | None:
        """The most tokens of an answer, None for as many as the context holds."""

    @abstractmethod
    def alternatives(self) -> int | None:
        """Likeliest tokens to tell per token, None for no log-probabilities at all."""

    def sampling(self, max_tokens: int, choice: int) -> SamplingParams:
        """Parameters of one choice. Choices of one seed differ, and each comes again with that seed."""
        defaults = SamplingParams()
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(self.top_k or 0, 0),
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            min_p=defaults.min_p if self.min_p is None else self.min_p,
            repetition_penalty=defaults.repetition_penalty
            if self.repetition_penalty is None
            else self.repetition_penalty,
            seed=None if self.seed is None else (self.seed + choice) % SEEDS,
            stop=tuple(self.stop),
            logprobs=self.alternatives(),
            ignore_eos=bool(self.ignore_eos),
        )


class CompletionRequest(GenerationRequest):
    refused: ClassVar[Refused] = REFUSED_COMPLETION

    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    def token_limit(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens

    def alternatives(self) -> int | None:
        return self.logprobs


class ChatRequest(GenerationRequest):
    refused: ClassVar[Refused] = REFUSED_CHAT

    messages: Annotated[list[Message], FailFast(), Field(min_length=1), BeforeValidator(_turns)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ApiError(
                400, "'top_logprobs' goes with logprobs: true only", code="invalid_value", param="top_logprobs"
            )
        return self

    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
