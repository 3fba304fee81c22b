"""What the endpoints take: OpenAI's fields that mean something here, and a few of ours."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Ids = list[int]
Seed = Annotated[int, Field(ge=-(2**62), le=2**62)]
Stop = str | Annotated[list[str], Field(max_length=16)] | None
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = dict[str, Annotated[float, Field(ge=-100, le=100)]] | None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None  # it always is


class ResponseFormat(BaseModel):
    """OpenAI's field for the form of the text."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(BaseModel):
    """vLLM's field for it."""

    model_config = ConfigDict(extra="forbid")
    regex: str | None = None
    json_: dict[str, Any] | str | None = Field(None, alias="json")
    choice: list[str] | None = None
    json_object: bool | None = None


class Sampled(BaseModel):
    """Fields of both kinds of completion. What is not known is refused by its name."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None  # "steered", "adapted" or "base"; or the model's name, as served
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    n: Annotated[int, Field(ge=1, le=128)] = 1
    seed: Seed | None = None
    stop: Stop = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    logit_bias: Bias = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = None
    strength: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None
    alpha: Annotated[float, Field(ge=0, le=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _unset(cls, values: Any) -> Any:
        """Leave out what is null, as if it had not been given."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class CompletionRequest(Sampled):
    prompt: str | Ids | list[str] | list[Ids]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[dict[str, Any]]


class ChatRequest(Sampled):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class TokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
