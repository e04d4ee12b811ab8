"""How the server runs: what the command line's flags say."""

from __future__ import annotations

from dataclasses import dataclass

from ggtool.backends import Engine


@dataclass(frozen=True, kw_only=True)
class Settings:
    """See `ggtool serve --help`.

    memory_budget_bytes: what all loaded models may take together. queue: requests of a model beyond its slots before 429.
    deadline_s: the longest that a request may take. drain_s: how long streams may go on once the server is told to stop.
    shares: whether models compute with fewer threads while others need the CPUs. max_body_bytes: of a request. template: the
    text of --chat-template, for models that have none of their own.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    memory_budget_bytes: int = 0
    n_ctx: int = 0
    threads: int = 1
    shares: bool = False
    device: str = "cpu"
    engine: Engine = "auto"
    slots: int = 4
    queue: int = 64
    deadline_s: float = 600.0
    drain_s: float = 30.0
    max_body_bytes: int = 8 << 20
    kv_type: str = "f16"
    lora: tuple[tuple[str, float], ...] = ()
    template: str | None = None
