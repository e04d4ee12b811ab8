"""What the libraries that compute can do here, each asked in a child: importing native code may crash, and takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any

from ggtool.system.child import Child, Parent

_CHILD = "ggtool.backends.probe"
_TIMEOUT_S = 120

Facts = dict[str, Any]


def probe_all() -> dict[str, Facts]:
    """Return {library: what it says of itself}, where it cannot be imported {"failure": the reason}; all are asked at once."""
    found = {}
    with ExitStack() as stack:
        children = {name: stack.enter_context(Child(_CHILD)) for name in PROBES}
        for name, child in children.items():
            child.send({"library": name})
        for name, child in children.items():
            try:
                event = child.receive(_TIMEOUT_S)
            except TimeoutError:
                event = {"failure": f"no answer within {_TIMEOUT_S} s"}
            found[name] = event or {"failure": child.cause_of_death()}
    return found


def _llama_cpp() -> Facts:
    from ggtool.backends.llama_cpp.model import gpu_offload, library_facts

    return {**library_facts(), "gpu": gpu_offload()}


def _torch() -> Facts:
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "version": torch.__version__,
        "built_for_cuda": torch.version.cuda,
        "gpu": torch.cuda.is_available(),
        "devices": names,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def _bitsandbytes() -> Facts:
    import bitsandbytes
    from bitsandbytes.cextension import lib

    return {"version": bitsandbytes.__version__, "gpu": bool(getattr(lib, "compiled_with_cuda", False))}


def _triton() -> Facts:
    import triton

    return {"version": triton.__version__}


PROBES: Mapping[str, Callable[[], Facts]] = MappingProxyType(
    {"llama_cpp": _llama_cpp, "torch": _torch, "bitsandbytes": _bitsandbytes, "triton": _triton}
)


def main() -> None:
    """Answer for one library."""
    parent = Parent()
    try:
        facts = PROBES[parent.receive()["library"]]()
    except ImportError as error:
        facts = {"failure": " ".join(str(error).split())}
    parent.send(**facts)


def package_versions(packages: tuple[str, ...]) -> dict[str, str | None]:
    """Return the installed release of each package, None for one that is not installed."""
    return {package: _release(package) for package in packages}


def _release(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
