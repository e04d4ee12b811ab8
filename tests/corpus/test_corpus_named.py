"""Named corpora through `datasets`, from a local server that speaks the Hub's protocol."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets_hub import DatasetsHub, datasets_hub

from ggtool.corpus import NAMED

CODE = """
import json, sys
from ggtool.corpus import load_text
from ggtool.errors import GgtoolError
try:
    text = load_text(sys.argv[1], None, print, samples=int(sys.argv[2]))
    print(json.dumps([text.text, text.revision]))
except GgtoolError as error:
    sys.exit(str(error))
"""


def fetch(name: str, url: str, home: Path, samples: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    # In a process of its own: datasets and huggingface_hub read their settings when they are imported.
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", **more}
    for offline in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if offline not in more:
            environment.pop(offline, None)
    return subprocess.run(
        [sys.executable, "-c", CODE, name, str(samples)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )


def text_of(done: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    assert done.returncode == 0, done.stderr
    text, revision = json.loads(done.stdout.splitlines()[-1])
    return text, revision


def write_rows(path: Path, column: str, rows: list[str], row_group_size: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({column: rows}), path, row_group_size=row_group_size)


def serve(name: str, folder: Path):
    return datasets_hub(NAMED[name].repo_id, NAMED[name].revision, folder)


def card(folder: Path, config: str, split: str) -> None:
    described = f"configs:\n- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {config}/{split}-*\n"
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\n{described}---\n")


@pytest.mark.parametrize("name", ["wikitext2", pytest.param("wikitext103", marks=pytest.mark.slow)])
def test_wikitext_is_put_together_as_its_file_was(name: str, tmp_path: Path) -> None:
    config, hub = NAMED[name].config, tmp_path / "hub"
    assert config
    card(hub, config, "test")
    write_rows(hub / config / "test-00000-of-00001.parquet", "text", ["", " = A = \n", "", " one two \n"])
    with serve(name, hub) as server:
        text, revision = text_of(fetch(name, server.url, tmp_path / "home"))
        assert text == " \n = A = \n \n one two "
        assert revision == NAMED[name].revision
        assert text_of(fetch(name, server.url, tmp_path / "home", 2))[0] == " \n = A = "
    # and once fetched, without any hub
    again = fetch(name, "http://127.0.0.1:9", tmp_path / "home", HF_HUB_OFFLINE="1")
    assert text_of(again)[0] == text


def test_ptb_comes_from_the_hubs_parquet_branch(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    write_rows(hub / "penn_treebank" / "test" / "0000.parquet", "sentence", ["no it was n't", "a <unk> bond"])
    write_rows(hub / "penn_treebank" / "train" / "0000.parquet", "sentence", ["not this"])
    with serve("ptb", hub) as server:
        text, _ = text_of(fetch("ptb", server.url, tmp_path / "home"))
    assert text == " no it was n't \n a <unk> bond "


def test_of_wikipedia_only_the_rows_needed_are_read(tmp_path: Path) -> None:
    config, hub = NAMED["wikipedia"].config, tmp_path / "hub"
    assert config
    card(hub, config, "train")
    random = np.random.default_rng(0)
    # Noise does not compress: 40 articles a shard of 1.6 MB, in row groups of two.
    rows = [f"Title {i}\n\n{random.bytes(20_000).hex()}" for i in range(40)]
    for shard in range(8):
        write_rows(hub / config / f"train-0000{shard}-of-00008.parquet", "text", rows, row_group_size=2)
    total = sum(file.stat().st_size for file in hub.rglob("*.parquet"))
    with serve("wikipedia", hub) as server:
        text, _ = text_of(fetch("wikipedia", server.url, tmp_path / "home", 3))
        assert text == f"{rows[0]}\n\nTitle 1"
        assert server.sent < total / 3, f"{server.sent} bytes of {total} were sent"


def test_a_corpus_that_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    server: DatasetsHub
    with serve("ptb", tmp_path) as server:
        done = fetch("wikitext2", server.url, tmp_path / "home")
    assert done.returncode == 1
    assert done.stderr.strip().startswith("the corpus wikitext2 (Salesforce/wikitext) is not in the cache")
    assert len(done.stderr.strip().splitlines()) == 1
