"""The process of a private server (`ggtool.serve.private`); the key is in its environment, where `ps` does not show it."""

from __future__ import annotations

import os

from ggtool.backends.device import choose_device
from ggtool.errors import GgtoolError
from ggtool.serve import server
from ggtool.serve.models import find_models
from ggtool.serve.pool import Pool
from ggtool.serve.settings import Settings
from ggtool.system.child import Parent, as_event
from ggtool.system.machine import usable_cpus

_DEADLINE_S = 24 * 3600.0  # who asks is at the terminal, and has Ctrl-C
_NO_BUDGET_BYTES = 1 << 62


def main() -> None:
    """Serve the model that the parent names, until the parent is gone."""
    parent = Parent()
    request = parent.receive()
    try:
        settings = Settings(
            port=0,
            api_key=os.environ.pop("GGTOOL_API_KEY"),
            memory_budget_bytes=_NO_BUDGET_BYTES,
            n_ctx=request["n_ctx"],
            threads=request["threads"] or usable_cpus(),
            shares=not request["threads"],
            device=choose_device(request["device"]),
            slots=1,
            deadline_s=_DEADLINE_S,
        )
        (model,) = find_models([request["model"]], None, lambda _text: None, settings.threads)
        listener = server.bind(settings)
    except GgtoolError as error:
        parent.send(**as_event(error))
        return
    parent.send(url=f"http://127.0.0.1:{listener.getsockname()[1]}", name=model.name)
    server.serve(Pool([model], settings), settings, listener)


if __name__ == "__main__":
    main()
