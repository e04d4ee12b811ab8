"""What is shown of weights and of GGUF files is held against what other readers and a second way of counting find."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file

from ggtool.conversion.convert import convert
from ggtool.errors import ArtifactError
from ggtool.evaluation.inspect_model import BLOCK, read_gguf, survey_weights
from ggtool.formats import find_qtype
from ggtool.quantizers.tables import NF4_VALUES
from ggtool.source.resolve import from_folder


@pytest.fixture(scope="module")
def model_file(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("survey") / "tiny-Q4_K_M.gguf"
    convert(from_folder(tiny_gpt2), [find_qtype("q4_k_m")], lambda _: path)
    return path


def rows_of_blocks(folder: Path) -> list[torch.Tensor]:
    """Every matrix of the blocks as (out, in), by names and not by ggtool's own reading of them."""
    tensors = load_file(folder / "model.safetensors")
    names = [name for name in tensors if ".c_" in name and name.endswith("weight")]
    return [tensors[name].float().T.contiguous() for name in names]


def test_nf4_does_to_the_weights_what_bitsandbytes_does(tiny_gpt2: Path) -> None:
    facts = survey_weights(from_folder(tiny_gpt2))
    matrices = rows_of_blocks(tiny_gpt2)
    assert facts.n_matrices == len(matrices) == 8
    noise = power = 0.0
    for weight in matrices:
        codes, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
        noise += float((dequantize_4bit(codes, state) - weight).double().square().sum())
        power += float(weight.double().square().sum())
    nf4 = next(levels for levels in facts.levels if levels.name == "NF4")
    assert nf4.values == NF4_VALUES
    # Rows are sampled, so the two agree as far as the sample does.
    assert nf4.absmax_error == pytest.approx(noise / power, rel=0.02)


def test_the_density_is_that_of_the_weights(tiny_gpt2: Path) -> None:
    facts = survey_weights(from_folder(tiny_gpt2))
    widths = np.diff(facts.edges)
    assert float((widths * facts.density).sum()) == pytest.approx(1.0)
    units = torch.cat(
        [
            (w.reshape(-1, BLOCK) / w.reshape(-1, BLOCK).abs().amax(1, keepdim=True)).flatten()
            for w in rows_of_blocks(tiny_gpt2)
        ]
    )
    inner = units[units.abs() < 1]
    middle = float((inner.abs() < 0.25).float().mean())
    cells = [
        d * w for d, w, low in zip(facts.density, widths, facts.edges, strict=False) if -0.25 <= low < 0.2499
    ]
    assert sum(cells) == pytest.approx(middle, abs=0.01)


def test_levels_that_follow_the_bell_use_their_codes_more_evenly(tiny_gpt2: Path) -> None:
    sets = {levels.name: levels for levels in survey_weights(from_folder(tiny_gpt2)).levels}
    # The tiny model's weights are drawn from a normal distribution.
    assert sets["linear int4"].code_bits < sets["NF4"].code_bits <= 4
    assert sets["NF4"].absmax_error < sets["linear int4"].absmax_error
    assert sets["IQ4"].searched_error < sets["FP4"].searched_error


def test_a_gguf_file_is_told_as_the_reference_reader_reads_it(model_file: Path) -> None:
    facts, reader = read_gguf(model_file), gguf.GGUFReader(model_file)
    assert facts.head.startswith("47 47 55 46 03 00 00 00")
    assert (facts.n_bytes, facts.alignment, facts.data_offset) == (
        model_file.stat().st_size,
        reader.alignment,
        reader.data_offset,
    )
    assert [key.name for key in facts.keys] == [
        name for name in reader.fields if not name.startswith("GGUF.")
    ]
    assert [(t.name, t.type, t.offset, t.n_bytes, t.shape) for t in facts.tensors] == [
        (t.name, t.tensor_type.name, t.data_offset, t.n_bytes, tuple(reversed(t.shape.tolist())))
        for t in reader.tensors
    ]


def test_another_file_is_refused(tiny_gpt2: Path) -> None:
    with pytest.raises(ArtifactError, match="not a GGUF file"):
        read_gguf(tiny_gpt2 / "config.json")
