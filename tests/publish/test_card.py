"""`ggtool card`: what stands in the card is what the files and their records say, and the Hub can read it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import gguf
import matplotlib.image
import numpy as np
import pytest
from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue
from huggingface_hub import ModelCard
from sample_record import RECORD
from writable_hub import writable_hub

from ggtool.cli.card import card as run_card
from ggtool.errors import OutputError, UsageError
from ggtool.gguf.edit import Changes, edit
from ggtool.gguf.imatrix import METHOD_KEY
from ggtool.gguf.writer import pack
from ggtool.publish.card_choice import choices
from ggtool.publish.card_facts import CardFile, match
from ggtool.results.records import EvalRecord
from ggtool.results.store import ResultStore
from ggtool.system.files import file_sha256

NAMES = ("tiny-gpt2-F16.gguf", "tiny-gpt2-Q8_0.gguf", "tiny-gpt2-Q4_0.gguf")


@pytest.fixture
def models(made_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made_folder, tmp_path / "tiny-gpt2-GGUF")


def record_of(sha256: str, ppl: float, kld: float, *, model: str = "someone/tiny") -> EvalRecord:
    assert RECORD.perplexity is not None
    assert RECORD.divergence is not None
    return replace(
        RECORD,
        model=model,
        revision="c" * 40 if "/" in model else "",
        format="gguf-x",
        artifact_sha256=sha256,
        perplexity=replace(RECORD.perplexity, ppl=ppl),
        divergence=replace(RECORD.divergence, kld_mean=kld, kld_stderr=kld / 100),
        environment={**RECORD.environment, "cpu": "A CPU", "ggtool": "9.9", "llama_cpp_commit": "abc1234"},
    )


@pytest.fixture
def measured(models: Path) -> dict[str, EvalRecord]:
    """Records of two of the three files, in the folder's store."""
    records = {
        NAMES[0]: record_of(file_sha256(models / NAMES[0]), 30.25, 0.0001),
        NAMES[2]: record_of(file_sha256(models / NAMES[2]), 31.5, 0.0425),
    }
    store = ResultStore(models / "results.jsonl")
    for record in records.values():
        store.append(record)
    return records


def write(folder: Path, **options: object) -> str:
    flags: dict[str, object] = {
        **dict.fromkeys(("model", "revision", "repo", "results", "license_")),
        **dict.fromkeys(("force", "json_"), False),
        "quiet": True,
    }
    run_card(folder, **{**flags, **options})
    return (folder / "README.md").read_text()


def rows(card: str) -> dict[str, list[str]]:
    """File -> the cells of its row in the table of choices."""
    found = {}
    for line in card.splitlines():
        if line.startswith("| [tiny"):
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            found[re.match(r"\[([^\]]+?)(?: \(\d+ parts\))?\]", cells[0])[1]] = cells[1:]
    return found


def test_the_hubs_own_client_reads_it(models: Path, measured: dict[str, EvalRecord]) -> None:
    write(models, repo="me/tiny-gpt2-GGUF", license_="mit")
    data = ModelCard.load(models / "README.md").data
    assert (data.base_model, data.base_model_relation) == ("someone/tiny", "quantized")
    assert (data.get("library_name"), data.license, data.pipeline_tag) == ("gguf", "mit", "text-generation")
    assert {"gguf", "quantized", "gpt2"} <= set(data.tags)
    assert data.model_name == "tiny-gpt2-GGUF"
    found = {(one.metric_args["file"], one.metric_type): one for one in data.eval_results}
    assert len(found) == len(data.eval_results) == 6
    for name, record in measured.items():
        ppl, far = found[name, "perplexity"], found[name, "kl_divergence"]
        assert ppl.metric_value == record.perplexity.ppl
        assert ppl.metric_args["stderr"] == record.perplexity.ppl_stderr
        assert ppl.metric_args["sha256"] == record.artifact_sha256
        assert far.metric_value == record.divergence.kld_mean
        assert found[name, "same_top_token"].metric_value == record.divergence.same_top
        assert ppl.task_type == "text-generation"
        assert ppl.dataset_name == record.corpus
    # What the client writes back is what it read.
    assert ModelCard(str(ModelCard.load(models / "README.md"))).data.to_dict() == data.to_dict()


def test_every_hash_and_size_in_it_is_the_files(models: Path, measured: dict[str, EvalRecord]) -> None:
    card = write(models)
    hashes = {name: hashlib.sha256((models / name).read_bytes()).hexdigest() for name in NAMES}
    listed = dict(re.findall(r"^([0-9a-f]{64})  (\S+)$", card, re.MULTILINE))
    assert {name: sha256 for sha256, name in listed.items()} == hashes
    of_texts = {record.text_sha256 for record in measured.values()}
    assert set(re.findall(r"\b[0-9a-f]{64}\b", card)) - of_texts == set(hashes.values())
    sizes = dict(re.findall(r"^\| (\S+) \| ([\d,]+) \|$", card, re.MULTILINE))
    assert {name: int(size.replace(",", "")) for name, size in sizes.items()} == {
        name: (models / name).stat().st_size for name in NAMES
    }
    for name, cells in rows(card).items():
        assert cells[1] == f"{(models / name).stat().st_size / 1e6:.1f} MB"
    block = re.search(r"## Files\n\n```\n(.*?)```", card, re.DOTALL)[1]
    (models / "SHA256SUMS").write_text(block)
    subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=models, check=True, capture_output=True)


def test_the_table_holds_the_records_and_blanks_elsewhere(
    models: Path, measured: dict[str, EvalRecord]
) -> None:
    found = rows(write(models))
    assert list(found) == list(NAMES)  # largest first
    assert found[NAMES[0]][3:7] == ["30.2500 ± 0.5000", "0.00010 ± 1.0e-06", "98.70 %", "75.5"]
    assert found[NAMES[2]][3:6] == ["31.5000 ± 0.5000", "0.04250 ± 0.00043", "98.70 %"]
    assert found[NAMES[1]][3:] == ["–"] * 5
    assert "on A CPU, 2 threads" in (models / "README.md").read_text()
    assert found[NAMES[2]][7] == "Smallest of those measured; perplexity +4.13 % on F16."


def test_a_file_rounded_with_error_feedback_is_said_to_be(models: Path) -> None:
    said = "gptq: error 0.629, 33/33 matrices, 128x512 tokens"
    pairs = pack({METHOD_KEY: GGUFValue(f"{said}   ", GGUFValueType.STRING)})
    edit(models / NAMES[2], Changes(set=pairs))
    card = write(models)
    assert f"- `{NAMES[2]}`: {said}\n" in card
    assert card.count("error feedback") == 1
    assert "Q4_0 + gptq" in rows(card)[NAMES[2]]


def test_a_record_of_another_file_counts_for_nothing(models: Path) -> None:
    ResultStore(models / "results.jsonl").append(record_of("0" * 64, 12.0, 0.5))
    card = write(models)
    assert all(cells[3:] == ["–"] * 5 for cells in rows(card).values())
    assert ModelCard.load(models / "README.md").data.eval_results is None
    assert not (models / "figures").exists()
    assert "12.0" not in card


def test_the_same_folder_gives_the_same_bytes(models: Path, measured: dict[str, EvalRecord]) -> None:
    def content() -> dict[str, bytes]:
        return {
            str(path): path.read_bytes()
            for path in models.rglob("*")
            if path.is_file() and path.suffix != ".gguf"
        }

    write(models)
    before = content()
    write(models)
    assert content() == before


def test_figures_are_drawn(models: Path, measured: dict[str, EvalRecord]) -> None:
    card = write(models)
    for name in ("quality", "speed"):
        assert f"](figures/{name}.png)" in card
        pixels = matplotlib.image.imread(models / "figures" / f"{name}.png")
        assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 10
        assert "</svg>" in (models / "figures" / f"{name}.svg").read_text()


def test_records_from_elsewhere_travel_with_the_files(models: Path, tmp_path: Path) -> None:
    elsewhere = ResultStore(tmp_path / "all.jsonl")
    mine = record_of(file_sha256(models / NAMES[0]), 30.0, 0.1)
    for record in (mine, record_of("0" * 64, 12.0, 0.5)):
        elsewhere.append(record)
    for _ in range(2):
        write(models, results=tmp_path / "all.jsonl")
        assert list(ResultStore(models / "results.jsonl")) == [mine]


def test_licence_and_languages_come_from_the_original_and_its_words_do_not(
    models: Path, tiny_gpt2: Path, tmp_path: Path
) -> None:
    original = shutil.copytree(tiny_gpt2, tmp_path / "original")
    matter = (
        "license: other\nlicense_name: harbour-1\nlicense_link: https://example.org/l\nlanguage: [en, no]"
    )
    (original / "README.md").write_text(f"---\n{matter}\n---\n# Words of somebody else\n")
    card = write(models, model=str(original))
    data = ModelCard.load(models / "README.md").data
    assert (data.license, data.license_name) == ("other", "harbour-1")
    assert data.license_link == "https://example.org/l"
    assert data.language == ["en", "no"]
    assert data.base_model is None  # a folder is no repo of the Hub
    assert "somebody else" not in card


def test_without_an_original_the_files_are_asked(tiny_gpt2: Path, tmp_path: Path) -> None:
    from ggtool.conversion.convert import convert
    from ggtool.formats import find_qtype
    from ggtool.source.resolve import from_folder

    original = shutil.copytree(tiny_gpt2, tmp_path / "tiny")
    (original / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: de\n---\n")
    folder = tmp_path / "made"
    convert(from_folder(original), [find_qtype("q4_0")], lambda fmt: folder / "tiny-Q4_0.gguf")
    write(folder)
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.language) == ("apache-2.0", ["de"])
    (original / "README.md").unlink()
    (folder / "tiny-Q4_0.gguf").unlink()
    convert(from_folder(original), [find_qtype("q4_0")], lambda fmt: folder / "tiny-Q4_0.gguf")
    assert "Licence: not known from the files" in write(folder)
    assert ModelCard.load(folder / "README.md").data.license is None


def test_a_card_of_ones_own_is_kept(models: Path) -> None:
    (models / "README.md").write_text("mine\n")
    with pytest.raises(OutputError, match=r"README\.md exists; pass --force"):
        write(models)
    assert (models / "README.md").read_text() == "mine\n"
    assert not (models / "Modelfile").exists()
    assert "## Which file" in write(models, force=True)
    assert "## Which file" in write(models)


def test_files_of_two_models_are_no_folder_for_a_card(models: Path) -> None:
    writer = gguf.GGUFWriter(models / "other.gguf", "gpt2")
    writer.add_name("Other")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UsageError, match=r"holds files of 2 models \(Other \(gpt2\), Tiny Gpt2 \(gpt2\)\)"):
        write(models)


def test_a_name_from_a_strange_file_cannot_write_the_card(tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "evil.gguf", "gpt2")
    writer.add_name("a\n---\nlicense: mit\n---\n<script>|x|\x1b[2J")
    writer.add_context_length(64)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    card = write(folder)
    data = ModelCard.load(folder / "README.md").data
    assert data.license is None
    assert data.get("library_name") == "gguf"
    assert "\x1b" not in card
    assert "<script>" not in card


def test_a_split_model_is_one_row_and_all_of_its_parts(tiny_gpt2: Path, tmp_path: Path) -> None:
    from ggtool.conversion.convert import convert
    from ggtool.conversion.options import Options
    from ggtool.formats import find_qtype
    from ggtool.gguf.model import open_artifact
    from ggtool.source.resolve import from_folder

    folder = tmp_path / "split"
    options = Options(split_max_bytes=1_000_000)
    convert(
        from_folder(tiny_gpt2), [find_qtype("f16")], lambda _: folder / "tiny-gpt2-F16.gguf", options=options
    )
    first = min(folder.iterdir())
    assert first.name.startswith("tiny-gpt2-F16-00001-of-0000")
    artifact = open_artifact(first)
    assert len(artifact.files) > 1
    ResultStore(folder / "results.jsonl").append(record_of(artifact.sha256, 30.0, 0.1))
    card = write(folder)
    assert list(rows(card)) == [first.name]
    assert rows(card)[first.name][3] == "30.0000 ± 0.5000"
    listed = dict(re.findall(r"^([0-9a-f]{64})  (\S+)$", card, re.MULTILINE))
    assert listed == {file_sha256(file): file.name for file in artifact.files}
    assert "Ollama reads no split models" in (folder / "Modelfile").read_text()


def quantized(label: str, n_bytes: int) -> CardFile:
    return CardFile(label, 4.5, False, label * 8, ((f"{label}.gguf", n_bytes, label * 8),))


def test_what_to_choose_follows_from_the_numbers() -> None:
    files = [quantized(*one) for one in (("F16", 1000), ("Q8", 500), ("Q6", 400), ("Q5", 450), ("Q2", 200))]
    klds = {"F16": 1e-6, "Q8": 1e-4, "Q6": 1e-3, "Q5": 5e-3, "Q2": 0.4}
    ppls = {"F16": 30.0, "Q8": 30.01, "Q6": 30.1, "Q5": 30.6, "Q2": 45.0}
    records = [record_of(file.sha256, ppls[file.qtype], klds[file.qtype]) for file in files]
    said = choices(match(files, records))
    assert said == {
        "F16.gguf": "Closest to the original.",
        "Q8.gguf": "Perplexity +0.03 % on F16, 50 % of its size.",
        "Q6.gguf": "First choice: the smallest within 1 % of the lowest perplexity, 40 % of its size.",
        "Q5.gguf": "Hardly: Q6 is no larger and closer to the original.",
        "Q2.gguf": "Smallest of those measured; perplexity +50.00 % on F16.",
    }
    # Inside each other's errors nothing is said of which is closer.
    alike = [replace(record, divergence=replace(record.divergence, kld_stderr=1.0)) for record in records]
    assert "Hardly" not in "".join(choices(match(files, alike)).values())
    worse = [
        replace(one, perplexity=replace(one.perplexity, ppl=31.0)) if one is records[2] else one
        for one in records
    ]
    assert choices(match(files, worse))["Q8.gguf"].startswith("First choice")


def test_perplexities_of_two_protocols_do_not_share_a_table() -> None:
    files = [quantized("A", 10), quantized("B", 20), quantized("C", 30)]
    other = replace(RECORD.perplexity, protocol="full", ppl=5.0)
    records = [record_of(file.sha256, 30.0 + number, 0.1) for number, file in enumerate(files)]
    records.append(replace(records[0], perplexity=other))
    found = match(files, records)
    assert [row.quality.perplexity.ppl for row in found.rows] == [30.0, 31.0, 32.0]
    assert len(found.all_quality) == 4


def test_a_carded_folder_is_pushed_and_pulled_whole(models: Path, measured, run, tmp_path: Path) -> None:
    with writable_hub() as server:
        carded = run(server, "card", models, "--repo", "someone/tiny-GGUF", "--license", "mit", "--json")
        assert carded.returncode == 0, carded.stderr
        assert {"README.md", "Modelfile", "results.jsonl"} <= set(json.loads(carded.stdout)["written"])
        pushed = run(server, "push", models, "someone/tiny-GGUF")
        assert pushed.returncode == 0, pushed.stderr
        pulled = run(server, "pull", "someone/tiny-GGUF", "-o", tmp_path / "back")
        assert pulled.returncode == 0, pulled.stderr

    def content(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    assert content(tmp_path / "back") == content(models)
