"""GET /openapi.json: the API as an OpenAPI 3.1 document, made of the bodies' own types."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ggtool import __version__
from ggtool.serve.api import bodies

_POSTS: dict[str, tuple[type[BaseModel], str]] = {
    "/v1/chat/completions": (bodies.ChatBody, "Answer a conversation."),
    "/v1/completions": (bodies.CompletionBody, "Continue texts; echo with logprobs scores the prompt."),
    "/v1/embeddings": (bodies.EmbeddingBody, "Turn texts into vectors."),
    "/v1/responses": (bodies.ResponsesBody, "Answer by OpenAI's Responses protocol, stateless."),
    "/v1/messages": (bodies.MessagesBody, "Answer by Anthropic's protocol."),
    "/v1/messages/count_tokens": (bodies.CountBody, "Count a prompt's tokens."),
    "/tokenize": (bodies.TokenizeBody, "Turn text into token ids."),
    "/detokenize": (bodies.DetokenizeBody, "Turn token ids into text."),
}
_GETS = {
    "/health": "Whether the server is up, and which models are loaded.",
    "/v1/models": "The models that there are.",
    "/metrics": "Prometheus' metrics.",
}
_ERRORS = (400, 401, 403, 404, 413, 429, 500, 503)


async def openapi(_request: Request) -> Response:
    """Answer GET /openapi.json."""
    return JSONResponse(_document())


@cache
def _document() -> dict[str, Any]:
    kinds = [(kind, "validation") for kind, _ in _POSTS.values()]
    references, definitions = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    paths: dict[str, Any] = {}
    for path, (kind, summary) in _POSTS.items():
        schema = references[(kind, "validation")]
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[path] = {"post": {"summary": summary, "requestBody": body, "responses": _responses()}}
    for path, summary in _GETS.items():
        paths[path] = {"get": {"summary": summary, "responses": _responses()}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "ggtool serve", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**definitions.get("$defs", {}), "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        },
    },
}


def _responses() -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    failures = {str(status): {"description": "See error.message.", "content": error} for status in _ERRORS}
    return {"200": {"description": "What was asked for."}, **failures}
