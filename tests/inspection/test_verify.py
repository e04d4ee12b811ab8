"""What `ggtool verify` finds: one thing is broken at a time, and that and nothing else is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_gguf
from typer.testing import CliRunner

from ggtool.cli.app import app
from ggtool.errors import ArtifactError
from ggtool.gguf.blocks import block_dtype
from ggtool.gguf.header import TensorInfo
from ggtool.gguf.reader import read_header
from ggtool.inspection.deep import compare_predictions
from ggtool.inspection.manifest import compare, read_manifest, write_manifest
from ggtool.inspection.opened import open_model
from ggtool.inspection.scales import check
from ggtool.inspection.verification import chat_template, examine

CORPUS = Path(__file__).parent.parent / "gguf_corpus"
Q4_0 = gguf.GGMLQuantizationType.Q4_0


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify") / "good.gguf"
    tiny_gguf.gpt2(path, qtype=Q4_0, chat_template=tiny_gguf.CHATML)
    return path


def found_in(path: str) -> set[tuple[str, str]]:
    """Codes and places of what the checks find that only look at bytes."""
    return {(one.code, one.where) for one in examine(open_model(path), 1)}


def verify(*arguments: str) -> tuple[int, dict]:
    done = CliRunner().invoke(app, ["verify", "--json", *arguments])
    assert done.exit_code in (0, 1), (done.output, done.exception)
    found = json.loads(done.stdout)
    assert found["ok"] is (done.exit_code == 0)
    return done.exit_code, found


def codes(path: str) -> set[str]:
    return {code for code, _ in found_in(path)}


def changed(good: Path, tmp_path: Path, change: Callable[[bytearray], object]) -> str:
    data = bytearray(good.read_bytes())
    change(data)
    path = tmp_path / "changed.gguf"
    path.write_bytes(data)
    return str(path)


def place(good: Path, name: str) -> TensorInfo:
    return next(tensor for tensor in read_header(good).tensors if tensor.name == name)


def test_a_sound_file_passes(good: Path) -> None:
    assert verify(str(good)) == (0, {"file": str(good), "ok": True, "findings": []})


def put(name: str, offset: int, data: bytes) -> Callable[[Path], Callable[[bytearray], None]]:
    """Write `data` at an offset into a tensor's own bytes."""

    def change(good: Path) -> Callable[[bytearray], None]:
        at = place(good, name).offset + offset
        return lambda file: file.__setitem__(slice(at, at + len(data)), data)

    return change


NAN, INF, HUGE, ZERO = (np.float16(value).tobytes() for value in (np.nan, np.inf, 60000, 0))
UP, NORM = "blk.0.ffn_up.weight", "blk.0.attn_norm.weight"


@pytest.mark.parametrize(
    ("change", "code", "where"),
    [
        (put(UP, 18, NAN), "nan", UP),
        (put(UP, 18, INF), "infinity", UP),
        (put(UP, 18, HUGE), "absurd-weights", UP),
        (put(UP, 18, ZERO), "dead-scale", UP),
        (put(NORM, 8, np.float32(np.nan).tobytes()), "nan", NORM),
        (put(NORM, 8, np.float32(-np.inf).tobytes()), "infinity", NORM),
        (put(UP, 0, bytes(256 * 64 // 32 * 18)), "constant", UP),
    ],
)
def test_damage_in_weights_is_found(
    good: Path, tmp_path: Path, change: Callable, code: str, where: str
) -> None:
    assert found_in(changed(good, tmp_path, change(good))) == {(code, where)}


def test_what_follows_the_last_tensor_and_what_pads_is_found(good: Path, tmp_path: Path) -> None:
    assert codes(changed(good, tmp_path, lambda file: file.extend(b"PK\3\4" + bytes(60)))) == {
        "trailing-bytes"
    }
    header = read_header(good)
    loose = next(t for t in header.tensors if (t.offset + t.n_bytes) % 32)
    end = loose.offset + loose.n_bytes
    assert codes(changed(good, tmp_path, lambda file: file.__setitem__(end, 7))) == {"padding"}


def test_a_header_that_is_broken_is_one_finding() -> None:
    for name, code in (("array-2-63", "array-length"), ("undersized-region", "overlap")):
        assert [one["code"] for one in verify(str(CORPUS / f"{name}.gguf"))[1]["findings"]] == [code]


def rename(old: bytes, new: bytes) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        at = data.index(old)
        data[at : at + len(old)] = new

    assert len(old) == len(new)
    return change


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        (b"tokenizer.ggml.token_type", b"tokenizer.ggml.token_typo", None),
        (b"tokenizer.ggml.merges", b"tokenizer.ggml.mergez", "tokenizer-merges"),
        (b"tokenizer.ggml.model", b"tokenizer.ggml.modex", "tokenizer-model"),
        (b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz", "tokenizer-tokens"),
        (b"blk.1.ffn_up.weight", b"blk.7.ffn_up.weight", "extra-layer"),
        (b"token_embd.weight", b"token_emby.weight", "no-output"),
    ],
)
def test_what_does_not_fit_together_is_found(
    good: Path, tmp_path: Path, old: bytes, new: bytes, code: str | None
) -> None:
    found = codes(changed(good, tmp_path, rename(old, new)))
    assert code is None or code in found


def test_an_id_beyond_the_vocabulary_is_found(good: Path, tmp_path: Path) -> None:
    _, value, end = read_header(good).spans["tokenizer.ggml.eos_token_id"]
    found = codes(changed(good, tmp_path, lambda file: file.__setitem__(slice(value, end), b"\xff\xff\0\0")))
    assert "tokenizer-id" in found


def test_a_manifest_tells_edited_keys_from_changed_weights(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(good.read_bytes())
    manifest = read_manifest(write_manifest(open_model(str(path)), 1))

    def differs(name: Path = path) -> list[list[tuple[str, str]]]:
        model = open_model(str(name))
        kinds = ("sha256", "xxh3_128")
        return [[(one.code, one.where) for one in compare(model, manifest, 1, kind=kind)] for kind in kinds]

    assert differs() == [[], []]
    at = place(good, UP).offset + 5
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert differs() == [[("manifest-content", UP)]] * 2
    data[at] ^= 1
    name = data.index(b"good", 0, 400)
    data[name : name + 4] = b"best"
    path.write_bytes(data)
    assert differs() == [[("manifest-header", "")]] * 2
    other = tmp_path / "other.gguf"
    tiny_gguf.gpt2(other, tied=False)
    assert {code for code, _ in differs(other)[0]} == {
        "manifest-form",
        "manifest-added",
        "manifest-header",
    }


def test_a_conversion_writes_a_manifest_that_verifies(tiny_gpt2: Path, tmp_path: Path) -> None:
    out = tmp_path / "made.gguf"
    done = CliRunner().invoke(
        app, ["convert", "--model", str(tiny_gpt2), "--qtype", "q8_0", "-o", str(out), "--manifest", "-q"]
    )
    assert done.exit_code == 0, done.output
    code, found = verify(str(out))
    assert (code, found["findings"]) == (0, [])
    assert found["manifest"] == f"{out}.manifest.json"


def test_a_manifest_that_is_none_is_one_line(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.json"
    for text in ("", "[]", '{"format": 1}', '{"format": 9, "files": [], "tensors": []}'):
        wrong.write_text(text)
        with pytest.raises(ArtifactError, match="is not a manifest of ggtool"):
            read_manifest(wrong)


def test_deep_compares_predictions(good: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference.gguf"
    tiny_gguf.gpt2(reference)
    found = compare_predictions(good, reference, 1)
    assert 0 < found["kld_mean"] < 0.5
    other = tmp_path / "other.gguf"
    tiny_gguf.gpt2(other, always="<|im_end|>")
    code, found = verify(str(other), "--deep", str(reference))
    assert code == 1
    assert [one["code"] for one in found["findings"]] == ["predictions"]


BLOCKS = {
    "Q8_0": "d",
    "Q6_K": "d",
    "Q2_K": "dmin",
    "IQ4_XS": "d",
    "TQ1_0": "d",
    "Q4_1": "m",
    "MXFP4": "e",
    "NVFP4": "d",
}


@pytest.mark.parametrize("type_name", [*BLOCKS, "IQ1_M"])
def test_scales_of_every_shape_are_looked_at(tmp_path: Path, type_name: str) -> None:
    rng = np.random.default_rng(3)
    dtype = block_dtype(type_name)
    records = np.frombuffer(rng.bytes(dtype.itemsize * 8), dtype).copy()
    if type_name == "IQ1_M":
        # Four quarters of the float16 0.01 in the top bits of each 16.
        words = records["scales"].view("<u2")
        words[:] = words & 0x0FFF | np.array([0x211F << shift & 0xF000 for shift in (12, 8, 4, 0)], "<u2")
    elif type_name in ("MXFP4", "NVFP4"):
        records[BLOCKS[type_name]] = 100
    else:
        for name in ("d", "dmin", "m"):
            if name in (dtype.names or ()):
                records[name] = 0.01
    clean = _faults(tmp_path, type_name, records)
    assert clean.is_sound
    assert not clean.is_constant
    if type_name == "IQ1_M":
        records["scales"][5, 1::2] |= 0xF0  # the four quarters of a float16 that is not a number
    elif type_name in ("MXFP4", "NVFP4"):
        records[BLOCKS[type_name]][5, 0] = 255 if type_name == "MXFP4" else 0x7F
    else:
        records[BLOCKS[type_name]][5] = np.nan
    assert _faults(tmp_path, type_name, records).n_nan == 1


def _faults(tmp_path: Path, type_name: str, records: np.ndarray):
    path = tmp_path / "blocks.gguf"
    writer = gguf.GGUFWriter(path, "gpt2")
    kind = gguf.GGMLQuantizationType[type_name]
    writer.add_tensor("t", records.view(np.uint8).reshape(1, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor, part = open_model(str(path)).tensors[0]
    return check(part, tensor)


# Published shapes of attacks through templates, and of templates that do not end.
EXPLOITS = {
    "template-escape": (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ self._TemplateReference__context.cycler.__init__.__globals__.os }}",
        "{% set ns = namespace(**{'__class__': 1}) %}{{ ns }}",
        "{{ messages.append(1) }}",
    ),
    "template-endless": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ range(99999)|list|sort|list|length }}{% for i in range(99999) %}{{ range(99999)|list|length }}{% endfor %}",
    ),
    "template-fails": (
        "{% import '/etc/passwd' as x %}{{ x }}",
        "{% include '/etc/passwd' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a'.ljust(10000000000) }}",
        "{{ '%10000000000d' % 1 }}",
        "{% set ns=namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    ),
    "template-invalid": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{% for %}"),
}


@pytest.mark.parametrize(
    ("code", "source"),
    [
        # One of each kind takes a second; all of them are too much for every run.
        pytest.param(code, source, marks=[pytest.mark.slow] if number else [])
        for code, sources in EXPLOITS.items()
        for number, source in enumerate(sources)
    ],
)
def test_a_hostile_template_is_contained(tmp_path: Path, code: str, source: str) -> None:
    path = tmp_path / "hostile.gguf"
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_chat_template(source)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert [one.code for one in chat_template(open_model(str(path)))] == [code]
