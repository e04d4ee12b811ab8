"""A mix that is chosen: it fits, it beats uniform types, and its recipe makes the same bytes again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from own_cache import own_cache
from tiny_models import TEXT

from ggtool.calibration.gguf_mix import SizeTarget, choose_recipe
from ggtool.conversion.options import Options
from ggtool.conversion.recipe import Recipe, imatrix_sha256, read_recipe, write_recipe
from ggtool.errors import UsageError
from ggtool.gguf.imatrix import Entry, ImportanceMatrix
from ggtool.gguf.model import open_artifact
from ggtool.source.resolve import from_folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {**os.environ, "GGTOOL_CACHE": own_cache(tmp_path_factory.mktemp("cache"))}


def ggtool(*arguments: object, env: dict[str, str], code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ggtool", "convert", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == code, done.stderr
    return done


def test_a_target_with_calibration_fits_and_its_recipe_makes_the_same_bytes(
    tiny_gpt2: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 3)
    flags = ("--model", tiny_gpt2, "--calibration", text, "-o", tmp_path)
    done = ggtool(*flags, "--target-bpw", 5, "--json", env=environment)
    (facts,) = json.loads(done.stdout)
    path = tmp_path / f"{tiny_gpt2.name}-5bpw.gguf"
    assert facts["path"] == str(path)
    artifact = open_artifact(path)
    assert 4.8 < artifact.bpw <= 5
    recipe = read_recipe(path.with_name(f"{tiny_gpt2.name}-5bpw.recipe.json"))
    assert recipe.expected_kld is not None
    assert recipe.expected_kld > 0
    assert {
        t.name: t.type_name for t in artifact.header.tensors if t.name in recipe.tensors
    } == recipe.tensors
    assert artifact.header.file_type == recipe.qtype
    before = path.read_bytes()
    missing = ggtool(
        "--model",
        tiny_gpt2,
        "--recipe",
        path.with_suffix(".recipe.json"),
        "-o",
        tmp_path / "x",
        env=environment,
        code=2,
    )
    assert "the recipe was made with the importance matrix" in missing.stderr
    # The same chunks and the output among them give the same importance matrix, found in the cache.
    matrix = next(Path(environment["GGTOOL_CACHE"]).rglob("*-imatrix.gguf"))
    again = tmp_path / "again"
    ggtool(
        "--model",
        tiny_gpt2,
        "--recipe",
        path.with_suffix(".recipe.json"),
        "--imatrix",
        matrix,
        "-o",
        again,
        env=environment,
    )
    made = again / path.name
    ours = {t.name: (t.type_name, before[t.offset : t.offset + t.n_bytes]) for t in artifact.header.tensors}
    data = made.read_bytes()
    theirs = {
        t.name: (t.type_name, data[t.offset : t.offset + t.n_bytes])
        for t in open_artifact(made).header.tensors
    }
    assert ours == theirs


def test_a_target_in_bytes_is_kept_to_and_replayed_whole(
    tiny_gpt2: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    ggtool("--model", tiny_gpt2, "--target-size", "1.1MB", "-o", tmp_path, env=environment)
    path = tmp_path / f"{tiny_gpt2.name}-1.1MB.gguf"
    assert 1_050_000 < path.stat().st_size <= 1_100_000
    recipe = tmp_path / f"{tiny_gpt2.name}-1.1MB.recipe.json"
    ggtool("--model", tiny_gpt2, "--recipe", recipe, "-o", tmp_path / "again", env=environment)
    assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert not list((tmp_path / "again").glob("*.json"))


def test_a_target_too_small_is_one_line(tiny_gpt2: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    done = ggtool("--model", tiny_gpt2, "--target-size", "200kB", "-o", tmp_path, env=environment, code=2)
    assert "the smallest mix takes" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target-bpw", "4", "--qtype", "q4_0"], "exclude each other"),
        (["--target-size", "60 sheep"], "is not a size; write it like 60MB"),
        (["--target-bpw", "4", "--pure"], "leave out --tensor-type"),
        (["--recipe", "nothing.json"], "nothing.json"),
        (["--vocab-only", "--qtype", "q4_0"], "takes no quant type"),
        (["--dry-run", "--calibration", "x.txt"], "reads no weights"),
        (["--qtype", "iq2_xs"], "IQ2_XS needs an importance matrix"),
        (["--qtype", "q4_0", "--tensor-type", "attn"], "not of the form KEY=VALUE"),
        ([], "no quant type named"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(
    flags: list[str], message: str, tiny_gpt2: Path, environment: dict[str, str]
) -> None:
    done = ggtool("--model", tiny_gpt2, *flags, env=environment, code=2)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_dry_run_lists_every_type_and_writes_nothing(
    tiny_gpt2: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    done = ggtool("--model", tiny_gpt2, "--dry-run", "--json", "-o", tmp_path, env=environment)
    plans = {item["qtype"]: item for item in json.loads(done.stdout)}
    assert len(plans) == 34
    assert list(tmp_path.iterdir()) == []
    ggtool("--model", tiny_gpt2, "--qtype", "q5_k_m", "-o", tmp_path, env=environment)
    assert (tmp_path / f"{tiny_gpt2.name}-Q5_K_M.gguf").stat().st_size == plans["Q5_K_M"]["n_bytes"]


def test_without_calibration_errors_alone_decide(tiny_gpt2: Path) -> None:
    found = choose_recipe(
        from_folder(tiny_gpt2),
        SizeTarget("x", max_bpw=6.0),
        Options(),
        None,
        2,
        lambda stage, done, total: None,
    )
    assert found.expected_kld is None
    assert found.imatrix_sha256 == ""
    assert set(found.tensors.values()) <= {
        "F16",
        "Q8_0",
        "Q6_K",
        "Q5_K",
        "Q5_0",
        "Q5_1",
        "Q4_K",
        "IQ4_NL",
        "IQ4_XS",
    }


def test_a_recipe_is_read_as_it_was_written(tmp_path: Path) -> None:
    imatrix = ImportanceMatrix("m", {"a": Entry(np.ones((1, 4), np.float32), np.array([2]))}, (), 1, 1)
    recipe = Recipe("4bpw", "Q4_K_M", {"a.weight": "Q4_K"}, imatrix_sha256(imatrix), "m", 0.25)
    write_recipe(tmp_path / "r.json", recipe)
    assert read_recipe(tmp_path / "r.json") == recipe
    recipe.check_imatrix(imatrix)
    for other in (None, ImportanceMatrix("m", {}, (), 1, 1)):
        with pytest.raises(UsageError, match="the recipe was made with"):
            recipe.check_imatrix(other)
    for text in ("{}", '{"kind": "ggtool recipe", "version": 1}', "[]", "x"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UsageError):
            read_recipe(tmp_path / "bad.json")


@pytest.mark.slow
def test_a_mix_for_gptq_goes_by_what_its_own_rounding_costs(
    tiny_gpt2: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 3)
    flags = ("--model", tiny_gpt2, "--calibration", text, "--target-bpw", 5)
    ggtool(*flags, "-o", tmp_path / "stock", env=environment)
    ggtool(*flags, "--method", "gptq", "-o", tmp_path / "ours", env=environment)
    name = f"{tiny_gpt2.name}-5bpw"
    ours = open_artifact(tmp_path / "ours" / f"{name}.gguf")
    assert 4.8 < ours.bpw <= 5
    assert "gptq" in str(ours.header.metadata)
    expected = [
        read_recipe(tmp_path / folder / f"{name}.recipe.json").expected_kld for folder in ("stock", "ours")
    ]
    assert None not in expected
    assert 0 < expected[1] < expected[0]  # type: ignore[operator]  # neither is None
    costs = json.loads(next(Path(environment["GGTOOL_CACHE"]).rglob("*-costs.json")).read_text())
    assert set(costs) > {"token_embd.weight", "blk.0.attn_qkv.weight", "blk.1.ffn_down.weight"}
    for of in costs.values():
        assert of["Q8_0"] < of["Q5_0"] < of["IQ4_NL"]
        assert "Q4_0" not in of or of["Q5_0"] < of["Q4_0"]
