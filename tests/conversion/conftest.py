"""Tiny models of every architecture with a row, each built once a session when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a tiny model by its name in tiny_families.FAMILIES."""
    from tiny_families import build_tiny

    root, built = tmp_path_factory.mktemp("families"), {}

    def find(name: str) -> Path:
        if name not in built:
            built[name] = build_tiny(name, root / f"tiny-{name}")
        return built[name]

    return find
