"""POST /tokenize, /detokenize and /v1/embeddings."""

from __future__ import annotations

import base64

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ggtool.serve.api.bodies import DetokenizeBody, EmbeddingBody, TokenizeBody
from ggtool.serve.api.generation import read_body
from ggtool.serve.engine.requests import RequestError
from ggtool.serve.pool import Pool


async def tokenize(request: Request) -> Response:
    """Answer POST /tokenize: {"content": text} to {"tokens": ids}."""
    body = await read_body(request, TokenizeBody)
    text = body.content if body.content is not None else body.prompt
    if text is None:
        raise RequestError(400, "content is missing.", "content")
    pool: Pool = request.app.state.pool
    async with pool.use(body.model) as process:
        found = await process.call(
            "tokenize", text=text, add_special=body.add_special, parse_special=body.parse_special
        )
    tokens = found["tokens"]
    pieces = [{"id": token, "piece": piece} for token, piece in zip(tokens, found["pieces"], strict=True)]
    return JSONResponse({"tokens": pieces if body.with_pieces else tokens, "count": len(tokens)})


async def detokenize(request: Request) -> Response:
    """Answer POST /detokenize: {"tokens": ids} to {"content": text}."""
    body = await read_body(request, DetokenizeBody)
    pool: Pool = request.app.state.pool
    async with pool.use(body.model) as process:
        text = await process.call("detokenize", tokens=body.tokens)
    return JSONResponse({"content": text})


async def embeddings(request: Request) -> Response:
    """Answer POST /v1/embeddings: vectors of length 1."""
    body = await read_body(request, EmbeddingBody)
    if body.dimensions is not None:
        raise RequestError(400, "dimensions: the vectors have the model's own length.", "dimensions")
    given = body.input
    is_one = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    inputs = [given] if is_one else list(given)
    pool: Pool = request.app.state.pool
    async with pool.use(body.model) as process:
        vectors, n_tokens = await process.call("embed", inputs=inputs)
    made = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return JSONResponse({"object": "list", "data": made, "model": pool.find(body.model).name, "usage": usage})


def _encoded(vector: list[float], encoding: str) -> list[float] | str:
    if encoding == "float":
        return vector
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode("ascii")
