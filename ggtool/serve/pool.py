"""The models of a server: loaded when first asked for, within a memory budget, the least recently used one leaves first."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from ggtool.serve.api.usage import Usage
from ggtool.serve.engine.process import ModelProcess
from ggtool.serve.engine.requests import ModelJob, RequestError
from ggtool.serve.models import ServedModel
from ggtool.serve.settings import Settings


class Pool:
    """Everything here runs in one event loop.

    Attributes:
        models: all that there are, by name.
        loaded: the processes of those that are loaded, by name.

    """

    def __init__(self, models: Sequence[ServedModel], settings: Settings) -> None:
        self.models = {model.name: model for model in models}
        self.loaded: dict[str, ModelProcess] = {}
        self.settings = settings
        self._used_s: dict[str, float] = {}
        self._users: dict[str, int] = {}
        self._loading = asyncio.Lock()
        self.restarts: dict[str, int] = dict.fromkeys(self.models, 0)
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0

    def find(self, name: str | None) -> ServedModel:
        """Return a model by name, without one the only or the first; RequestError 404 names those that there are."""
        if name is None or name == "":
            return next(iter(self.models.values()))
        found = self.models.get(name)
        if found is None:
            known = ", ".join(self.models)
            raise RequestError(404, f"there is no model {name[:200]!r}; there are: {known}.", "model")
        return found

    @asynccontextmanager
    async def use(self, name: str | None, *, n_requests: int = 1) -> AsyncIterator[ModelProcess]:
        """Yield a model's process, loaded, which stays while it is used.

        Raises RequestError: 404 for another name, 400 for more texts than its queue ever takes, 429 when it is full, 503
        when the model does not fit the memory.
        """
        model = self.find(name)
        self._check_queue(model.name, n_requests)
        self._users[model.name] = self._users.get(model.name, 0) + 1
        try:
            process = self.loaded.get(model.name)
            if process is None or not process.is_alive:
                process = await self._load(model)
            self._used_s[model.name] = time.monotonic()
            yield process
        finally:
            self._users[model.name] -= 1
            self._used_s[model.name] = time.monotonic()

    def count(self, usage: Usage) -> None:
        """Add what a response cost to the totals."""
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.completion_tokens += usage.completion_tokens

    async def close(self) -> None:
        """Stop all processes."""
        await asyncio.gather(*(process.stop() for process in self.loaded.values()))
        self.loaded.clear()

    def memory_bytes(self) -> int:
        """Return the resident memory of all processes."""
        return sum(process.memory_bytes() for process in self.loaded.values())

    def _check_queue(self, name: str, n_requests: int) -> None:
        process = self.loaded.get(name)
        pending = process.n_pending if process is not None else self._users.get(name, 0)
        room = self.settings.slots + self.settings.queue
        if n_requests > room:
            message = f"the request is for {n_requests} texts and the server takes {room} at once; send fewer in one request."
            raise RequestError(400, message)
        if pending + n_requests > room:
            raise RequestError(429, f"{name} is busy with {pending} requests; try again in a moment.")

    async def _load(self, model: ServedModel) -> ModelProcess:
        async with self._loading:
            process = self.loaded.get(model.name)
            if process is not None and process.is_alive:
                return process  # another request loaded it meanwhile
            if process is not None:
                self.restarts[model.name] += 1
                await process.stop()
                del self.loaded[model.name]
            await self._make_room(model)
            process = ModelProcess(self._job(model))
            try:
                await process.start()
            except RequestError as error:
                # The reason may name files of this machine: it is for whoever runs the server.
                sys.stderr.write(f"{model.name}: {error.message}\n")
                message = f"the model {model.name} could not be loaded; the server's own output says why."
                raise RequestError(500, message, "model") from None
            self.loaded[model.name] = process
            await self._shrink(model.name)
            return process

    def _job(self, model: ServedModel) -> ModelJob:
        settings = self.settings
        return ModelJob(
            path=str(model.path),
            format=model.format_fields,
            components=model.components,
            n_ctx=settings.n_ctx,
            threads=settings.threads,
            shares=settings.shares,
            device=settings.device,
            engine=settings.engine,
            slots=settings.slots,
            kv_type=settings.kv_type,
            lora=list(settings.lora),
            template=None if model.can_chat else settings.template,
        )

    async def _shrink(self, newest: str) -> None:
        """Unload what nobody uses while all together take more than the budget, now that the newest one's size is known."""
        while self.memory_bytes() > self.settings.memory_budget_bytes:
            idle = [name for name in self.loaded if name != newest and not self._users.get(name)]
            if not idle:
                return
            await self._unload_oldest(idle)

    async def _unload_oldest(self, names: Sequence[str]) -> None:
        oldest = min(names, key=lambda name: self._used_s.get(name, 0.0))
        await self.loaded.pop(oldest).stop()

    async def _make_room(self, model: ServedModel) -> None:
        """Unload models that nobody uses, the least recently used first, until the new one fits."""
        budget = self.settings.memory_budget_bytes
        while self.loaded and self.memory_bytes() + model.n_bytes > budget:
            idle = [name for name in self.loaded if not self._users.get(name)]
            if not idle:
                message = f"{model.name} does not fit beside the models in use; try again when they are done."
                raise RequestError(503, message, "model")
            await self._unload_oldest(idle)
        if model.n_bytes > budget:
            size, limit = model.n_bytes / 2**20, budget / 2**20
            message = f"{model.name} takes {size:.0f} MiB, and --memory-budget is {limit:.0f} MiB."
            raise RequestError(503, message, "model")
