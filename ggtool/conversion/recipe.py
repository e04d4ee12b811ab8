"""Recipes: the tensor type of every tensor of a mix, as a JSON file beside the model that can be replayed.

Replayed on the same checkpoint with the same importance matrix it gives the same file, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ggtool.conversion.tensor_types import find_tensor_type
from ggtool.errors import SourceError, UsageError
from ggtool.formats import Format, find_qtype
from ggtool.gguf.imatrix import ImportanceMatrix
from ggtool.system.atomic import atomic_output
from ggtool.system.files import read_json

_KIND, _VERSION = "ggtool recipe", 1


@dataclass(frozen=True)
class Recipe:
    """A mix of tensor types.

    Attributes:
        name: used in file names in place of the quant type, such as "4.5bpw".
        qtype: the nearest quant type, written to general.file_type.
        tensors: tensor -> tensor type, for every tensor that is not F32.
        imatrix_sha256: of the importance data that was used; empty for none.
        imatrix: its path, for information.
        expected_kld: expected mean KL divergence from the original, in nats; None without calibration.

    """

    name: str
    qtype: str
    tensors: Mapping[str, str]
    imatrix_sha256: str = ""
    imatrix: str = ""
    expected_kld: float | None = None

    @property
    def format(self) -> Format:
        """The row of the quant type under the recipe's name."""
        return replace(find_qtype(self.qtype), name=self.name, needs_imatrix=False)

    def check_imatrix(self, imatrix: ImportanceMatrix | None) -> None:
        """Raise UsageError unless `imatrix` is the one the recipe was chosen with."""
        found = imatrix_sha256(imatrix)
        if self.imatrix_sha256 and not found:
            raise UsageError(
                f"the recipe was made with the importance matrix {self.imatrix}; pass --imatrix."
            )
        if found != self.imatrix_sha256:
            wanted = f"{self.imatrix}, another one" if self.imatrix_sha256 else "none"
            raise UsageError(
                f"the recipe was made with {wanted}; the same bytes need the same importance matrix."
            )


def imatrix_sha256(imatrix: ImportanceMatrix | None) -> str:
    """Return one sha256 over what decides the bytes of a file: names and weights; "" for no importance matrix."""
    if imatrix is None:
        return ""
    digest = hashlib.sha256()
    for name in sorted(imatrix.entries):
        digest.update(name.encode() + b"\0" + imatrix.entries[name].weights().tobytes())
    return digest.hexdigest()


def recipe_path(model: Path) -> Path:
    """Return where the recipe of a file goes: MODEL.recipe.json."""
    return model.with_name(model.name.removesuffix(".gguf") + ".recipe.json")


def write_recipe(path: Path, recipe: Recipe, *, force: bool = False) -> None:
    """Write a recipe as JSON."""
    facts = {"kind": _KIND, "version": _VERSION, **asdict(recipe)}
    with atomic_output(path, force=force) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def read_recipe(path: Path) -> Recipe:
    """Read a recipe; UsageError if the file is not one."""
    try:
        facts: Mapping[str, Any] = read_json(path)
    except SourceError as error:
        raise UsageError(str(error)) from None
    if facts.get("kind") != _KIND or facts.get("version") != _VERSION:
        raise UsageError(f"{path} is not a recipe of this version of ggtool.")
    fields = {key: value for key, value in facts.items() if key not in {"kind", "version"}}
    try:
        recipe = Recipe(**fields)
        tensors = {str(name): find_tensor_type(kind) for name, kind in recipe.tensors.items()}
        recipe.format  # noqa: B018  # an unknown quant type is a UsageError
    except (AttributeError, TypeError):
        raise UsageError(f"{path} is a damaged recipe.") from None
    return replace(recipe, tensors=tensors)
