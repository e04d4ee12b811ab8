"""The bodies that requests may have. Unknown fields are passed over, as clients send many; known ones are bounded."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_MAX_N = 16
_MAX_PROMPTS = 256
_MAX_TOKENS = 1 << 20
_MAX_DEPTH = 32  # of JSON schemas and tool parameters
_MAX_NODES = 20_000


def _bounded_json(value: Any) -> Any:
    """Refuse an object that is nested too deep or has too many parts."""
    count, level = 0, [value]
    for _ in range(_MAX_DEPTH):
        count += len(level)
        if count > _MAX_NODES:
            raise ValueError(f"has more than {_MAX_NODES} parts")
        level = [
            child
            for one in level
            if isinstance(one, dict | list)
            for child in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return value
    raise ValueError(f"is nested more than {_MAX_DEPTH} levels deep")


BoundedObject = Annotated[dict[str, Any], BeforeValidator(_bounded_json)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Stop = StopText | Annotated[list[StopText], Field(max_length=16)] | None
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(max_length=_MAX_TOKENS)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
# Logits are divided by it: beyond these one division moves a token from certain to impossible, or to infinity.
RepeatPenalty = Annotated[float, Field(ge=0.01, le=100)]


class Body(BaseModel):
    """What all bodies have in common."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)
    model: Annotated[str, Field(max_length=1000)] | None = None


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    include_usage: bool = False


class SamplingBody(Body):
    """How tokens are chosen; what is left out has ggtool's defaults."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    min_p: Probability | None = None
    repeat_penalty: RepeatPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    stop: Stop = None
    logit_bias: Annotated[dict[int, Bias], Field(max_length=1024)] | None = None
    n: Annotated[int, Field(ge=1, le=_MAX_N)] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class JsonSchema(BaseModel):
    """A named schema."""

    name: str = ""
    schema_: BoundedObject = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """Free text, any JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(max_length=_MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(max_length=_MAX_PROMPTS)]
    ) = ""
    max_tokens: Annotated[int, Field(ge=0, le=_MAX_TOKENS)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=100)] | bool | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    response_format: ResponseFormat | None = None


class FunctionCall(BaseModel):
    """A call that the model made in an earlier turn."""

    name: Annotated[str, Field(max_length=256)]
    arguments: str = "{}"


class ToolCall(BaseModel):
    """A call of an earlier turn, with its id."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class ContentPart(BaseModel):
    """A part of a message; text is what these models take."""

    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: str | None = None


FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]


class FunctionSpec(BaseModel):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: BoundedObject | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A tool; only functions can be called here."""

    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(BaseModel):
    """The name of a function."""

    name: FunctionName


class NamedTool(BaseModel):
    """A choice of one function."""

    type: Literal["function"] = "function"
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool | None


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000)]
    max_tokens: Annotated[int, Field(ge=1, le=_MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=_MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice = None
    chat_template_kwargs: BoundedObject | None = None


class EmbeddingBody(Body):
    """POST /v1/embeddings."""

    input: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=_MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=_MAX_PROMPTS)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


class TokenizeBody(Body):
    """POST /tokenize."""

    content: str | None = None
    prompt: str | None = None
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: TokenIds


class ResponsesTool(BaseModel):
    """A tool in the Responses API's flat form; those that are no functions are passed over."""

    model_config = ConfigDict(extra="ignore")
    type: str
    name: str | None = None
    description: str | None = None
    parameters: BoundedObject | None = None


class TextFormat(BaseModel):
    """The form of the answer, flat."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    schema_: BoundedObject | None = Field(default=None, alias="schema")


class TextOptions(BaseModel):
    """What the answer looks like."""

    format: TextFormat | None = None


class ResponsesChoice(BaseModel):
    """A choice of one tool."""

    type: str
    name: str | None = None


class ResponsesBody(Body):
    """POST /v1/responses."""

    input: str | Annotated[list[BoundedObject], Field(max_length=10_000)] = ""
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=_MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Probability | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    tools: Annotated[list[ResponsesTool], Field(max_length=256)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesChoice | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    metadata: dict[str, Any] | None = None


class AnthropicBlock(BaseModel):
    """A block of a message's content; fields by type."""

    model_config = ConfigDict(extra="ignore")
    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[AnthropicBlock] | None = None
    thinking: str | None = None


class AnthropicMessage(BaseModel):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: str | list[AnthropicBlock]


class AnthropicTool(BaseModel):
    """A tool with its input's schema; server tools, which have none, are passed over."""

    model_config = ConfigDict(extra="ignore")
    type: str | None = None
    name: str
    description: str | None = None
    input_schema: BoundedObject | None = None


class AnthropicChoice(BaseModel):
    """Whether and which tool is called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None


class CountBody(Body):
    """POST /v1/messages/count_tokens."""

    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=10_000)]
    system: str | list[AnthropicBlock] | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=256)] | None = None
    tool_choice: AnthropicChoice | None = None


class OutputFormat(BaseModel):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    schema_: BoundedObject = Field(alias="schema")


class OutputConfig(BaseModel):
    """What the answer looks like."""

    format: OutputFormat | None = None


class MessagesBody(CountBody):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, le=_MAX_TOKENS)]
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    stop_sequences: Annotated[list[StopText], Field(max_length=16)] | None = None
    output_config: OutputConfig | None = None
    stream: bool | None = None
