"""GET /health, /v1/models, /metrics: what is served, and how it goes."""

from __future__ import annotations

from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ggtool.serve.engine.requests import RequestError
from ggtool.serve.models import ServedModel
from ggtool.serve.pool import Pool


async def health(request: Request) -> Response:
    """Answer GET /health: the server is up, and which models are loaded."""
    pool: Pool = request.app.state.pool
    loaded = {
        name: {"busy": process.busy, "waiting": process.waiting, "memory_bytes": process.memory_bytes()}
        for name, process in pool.loaded.items()
        if process.is_alive
    }
    return JSONResponse({"status": "ok", "loaded": loaded})


async def list_models(request: Request) -> Response:
    """Answer GET /v1/models; "models" is the same list again, for clients that look there."""
    pool: Pool = request.app.state.pool
    listed = [_describe(pool, model, request) for model in pool.models.values()]
    return JSONResponse({"object": "list", "data": listed, "models": listed})


async def one_model(request: Request) -> Response:
    """Answer GET /v1/models/NAME."""
    pool: Pool = request.app.state.pool
    name = request.path_params["name"]
    if name not in pool.models:
        raise RequestError(
            404, f"there is no model {name[:200]!r}; there are: {', '.join(pool.models)}.", "model"
        )
    return JSONResponse(_describe(pool, pool.models[name], request))


def _describe(pool: Pool, model: ServedModel, request: Request) -> dict[str, Any]:
    process = pool.loaded.get(model.name)
    is_loaded = process is not None and process.is_alive
    facts = process.facts if process is not None and is_loaded else {}
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "ggtool",
        "name": model.name,
        "meta": {
            "format": model.format.backend,
            "n_bytes": model.n_bytes,
            "can_chat": model.can_chat or request.app.state.settings.template is not None,
            "is_loaded": is_loaded,
            "n_ctx": facts.get("n_ctx"),
            "description": facts.get("description"),
            "kv_cache_bytes": facts.get("kv_cache_bytes"),
        },
    }


class _Collector:
    """The pool's numbers as Prometheus' metrics, read when they are asked for."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def collect(self) -> list[Metric]:
        """Return all metrics."""
        pool = self._pool
        totals = [
            ("ggtool_prompt_tokens", "Tokens of prompts, cached ones included.", pool.prompt_tokens),
            ("ggtool_cached_tokens", "Tokens of prompts taken from the KV cache.", pool.cached_tokens),
            ("ggtool_predicted_tokens", "Tokens generated.", pool.completion_tokens),
        ]
        metrics: list[Metric] = [CounterMetricFamily(name, text, value) for name, text, value in totals]
        restarts = CounterMetricFamily("ggtool_model_restarts", "Processes started again.", labels=["model"])
        for name, count in pool.restarts.items():
            restarts.add_metric([name], count)
        busy = GaugeMetricFamily("ggtool_slots_busy", "Slots in use.", labels=["model"])
        waiting = GaugeMetricFamily("ggtool_requests_waiting", "Requests without a slot.", labels=["model"])
        memory = GaugeMetricFamily("ggtool_memory_bytes", "Resident memory of a model.", labels=["model"])
        for name, process in pool.loaded.items():
            busy.add_metric([name], process.busy)
            waiting.add_metric([name], process.waiting)
            memory.add_metric([name], process.memory_bytes())
        return [*metrics, restarts, busy, waiting, memory]


def make_registry(pool: Pool) -> CollectorRegistry:
    """Return a registry of the pool's metrics."""
    registry = CollectorRegistry()
    registry.register(_Collector(pool))
    return registry


async def metrics(request: Request) -> Response:
    """Answer GET /metrics in Prometheus' text format."""
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)
