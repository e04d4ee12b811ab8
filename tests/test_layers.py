"""Imports go one way: docs/design.md draws the house, this test holds the code to it by reading every file."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ggtool"

# What everything may import.
GROUND = {"", "errors", "formats", "system"}
# Folder -> the folders that it may import beside the ground. A folder stands below all that may import it.
HOUSE = {
    "source": set(),
    "gguf": set(),
    "results": set(),
    "kernels": set(),
    "corpus": {"source"},
    "conversion": {"source", "gguf"},
    "quantizers": {"source", "corpus", "kernels"},
    "backends": {"source", "gguf", "corpus", "quantizers", "kernels"},
    "calibration": {"source", "gguf", "kernels", "corpus", "conversion", "quantizers", "backends"},
    "chat": {"quantizers", "backends"},
    "evaluation": {
        "source",
        "gguf",
        "results",
        "kernels",
        "corpus",
        "conversion",
        "quantizers",
        "backends",
        "calibration",
    },
    "serve": {
        "kernels",
        "source",
        "gguf",
        "quantizers",
        "backends",
        "chat",
        "evaluation",
    },
    "inspection": {"gguf", "conversion", "backends", "chat", "evaluation", "publish"},
    "report": {"results"},
    "publish": {"gguf", "results", "chat", "report"},
}
# The top: what may import every folder.
TOP = {"api", "cli", "__main__"}
# So that the house can be taken in at a glance.
MOST_FOLDERS = 17
ROOT_FILES = {"__init__.py", "__main__.py", "api.py", "errors.py", "formats.py", "py.typed"}

MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """The dotted name below ggtool; a package's `__init__` has the package's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def folder(module: str) -> str:
    return module.partition(".")[0]


def type_checking_only(tree: ast.Module) -> set[ast.AST]:
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return {child for block in blocks for child in ast.walk(block)}


def imported(path: Path) -> set[str]:
    """Dotted names below ggtool of the modules that a file imports at run time, anywhere in it."""
    tree = ast.parse(path.read_text())
    skipped = type_checking_only(tree)
    found = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "ggtool"}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ggtool":
            for alias in node.names:
                child = PACKAGE.parent / node.module.replace(".", "/") / alias.name
                is_module = child.with_suffix(".py").exists() or child.is_dir()
                found.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return {name.removeprefix("ggtool").removeprefix(".") for name in found}


def breach(importer: str, name: str) -> bool:
    """Whether the house forbids `importer` to import `name`."""
    source, target = folder(importer), folder(name)
    if source == target or target in GROUND or source in TOP:
        return False
    return source in GROUND or target not in HOUSE[source]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_file_imports_what_its_folder_may(path: Path) -> None:
    importer = module_name(path)
    assert folder(importer) in GROUND | HOUSE.keys() | TOP, f"ggtool.{importer} has no place in the house"
    breaches = [name for name in imported(path) if breach(importer, name)]
    assert not breaches, f"{importer} imports {', '.join(breaches)}"


def test_the_ground_stands_on_itself() -> None:
    for path in MODULES:
        importer = module_name(path)
        if folder(importer) in {"errors", "formats"}:
            assert imported(path) <= {"errors"}, importer


def test_no_folder_is_above_itself() -> None:
    list(TopologicalSorter(HOUSE).static_order())


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Not even inside functions: what must be imported late is a part that sits in the wrong file."""
    graph = {module_name(path): imported(path) - {module_name(path)} for path in MODULES}
    list(TopologicalSorter(graph).static_order())


def test_the_house_can_be_taken_in_at_a_glance() -> None:
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    folders = {path.name for path in entries if path.is_dir() and any(path.rglob("*.py"))}
    assert len(folders) <= MOST_FOLDERS, sorted(folders)
    assert {path.name for path in entries if path.is_file()} == ROOT_FILES


def test_a_breach_and_a_circle_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "breach.py"
    file.write_text("def f():\n    from ggtool.evaluation.plan import plan\n    from ggtool import corpus\n")
    assert imported(file) == {"evaluation.plan", "corpus"}
    assert breach("gguf.header", "evaluation.plan")
    assert breach("system.worker", "evaluation.tasks")
    assert not breach("evaluation.evaluate", "corpus")
    with pytest.raises(CycleError):
        list(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())
