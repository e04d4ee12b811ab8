"""Imports go one way: docs/design.md draws the layers, this test enforces them by reading the source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ggtool"

LAYERS = {
    0: {"", "errors", "formats", "results", "atomic", "environment", "cache", "facts"},
    1: {
        "allocation",
        "quantized_folder",
        "checkpoint",
        "pickled",
        "source",
        "artifact",
        "gguf_header",
        "corpus",
        "quantizers.__init__",
        "backends.__init__",
    },
    2: {"convert", "quantizers", "kernels", "backends", "metrics"},
    3: {
        "calibration",
        "sensitivity",
        "targeting",
        "mixing",
        "job",
        "measure",
        "worker",
        "packing",
        "spec",
        "files",
        "plan",
        "keys",
        "evaluate",
        "experiment",
        "training",
        "hub",
        "samples",
        "survey",
    },
    4: {"report", "chat"},
    5: {
        "cli",
        "cli_convert",
        "cli_chat",
        "cli_eval",
        "cli_sweep",
        "cli_quantize",
        "cli_publish",
        "cli_report",
        "flags",
        "commands",
        "__main__",
    },
}
# Within layer 2 a folder may import another only along these arrows.
ARROWS = {("quantizers", "kernels"), ("backends", "quantizers")}
# The report knows records and facts, not how they were made.
ONLY_RESULTS = "report"
MODULES = sorted(PACKAGE.rglob("*.py"))


def noun(module: str) -> str:
    """The layer table's name for a dotted module below ggtool."""
    return module.split(".")[0]


def layer(module: str) -> int:
    for number, names in LAYERS.items():
        if module in names:
            return number
    for number, names in LAYERS.items():
        if noun(module) in names:
            return number
    raise AssertionError(f"ggtool.{module} has no layer: add it to the table")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts == ("__init__",):
        return ""
    if parts[-1] == "__init__":
        package = ".".join(parts)
        return package if package in LAYERS[1] else parts[0]
    return ".".join(parts)


def type_checking_only(tree: ast.Module) -> set[ast.stmt]:
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return {child for block in blocks for child in ast.walk(block) if isinstance(child, ast.stmt)}


def imported(path: Path) -> set[str]:
    """Dotted names below ggtool that a file imports at run time; a package's __init__ is named as such."""
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
                child = PACKAGE.parent / node.module.replace(".", "/") / f"{alias.name}.py"
                folder = PACKAGE.parent / node.module.replace(".", "/") / alias.name
                found.add(f"{node.module}.{alias.name}" if child.exists() or folder.is_dir() else node.module)
    names = {name.removeprefix("ggtool").removeprefix(".") for name in found}
    return {f"{name}.__init__" if f"{name}.__init__" in LAYERS[1] else name for name in names}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    importer = module_name(path)
    for name in imported(path):
        assert layer(name) <= layer(importer), f"{importer} (layer {layer(importer)}) imports {name}"
        if layer(importer) == 2 and layer(name) == 2 and noun(importer) != noun(name):
            assert (noun(importer), noun(name)) in ARROWS, f"{importer} imports {name}"
        if noun(importer) == ONLY_RESULTS:
            assert noun(name) in {"", "results", "facts", "errors", ONLY_RESULTS}, (
                f"{importer} imports {name}"
            )


def test_the_reader_of_imports_sees_a_breach(tmp_path: Path) -> None:
    breach = tmp_path / "breach.py"
    breach.write_text("def f():\n    from ggtool.evaluate import plan\n")
    assert imported(breach) == {"evaluate"}
    assert layer("evaluate") > layer("metrics.speed")
