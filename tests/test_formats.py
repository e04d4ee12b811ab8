import pytest

from ggtool.errors import UsageError
from ggtool.formats import (
    FORMATS,
    dense_qtypes,
    find_backend,
    find_qtype,
    qtypes,
    split_list,
)


def test_every_row_is_found_by_the_name_it_is_typed_by() -> None:
    for name, row in FORMATS.items():
        assert find_backend(name) is row
        assert find_backend(name.upper()) is row


def test_quant_types_agree_with_llama_cpp() -> None:
    from llama_cpp import llama_cpp

    for row in qtypes():
        prefix = "LLAMA_FTYPE_ALL_" if row.name == "F32" else "LLAMA_FTYPE_MOSTLY_"
        assert row.ftype == getattr(llama_cpp, prefix + row.name), row.name


# The main tensor type of the mixes that are not named after theirs.
MAIN = {"IQ3_XS": "IQ3_S", "IQ3_M": "IQ3_S", "IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S", "MXFP4_MOE": "MXFP4"}


def test_nominal_bits_agree_with_llama_cpp() -> None:
    from ggtool.gguf.tensor_types import TENSOR_TYPES

    sizes = {name: 8 * n_bytes / block for name, block, n_bytes in TENSOR_TYPES.values()}
    for row in qtypes():
        stem = row.name.rpartition("_")[0]
        main = MAIN.get(row.name) or (row.name if row.name in sizes else stem)
        assert row.bits == sizes[main], row.name


def test_types_that_make_sense_for_a_model_without_experts() -> None:
    everything, plain = dense_qtypes(with_imatrix=True), dense_qtypes(with_imatrix=False)
    assert {row.name for row in qtypes()} - {row.name for row in everything} == {"MXFP4_MOE"}
    assert not any(row.needs_imatrix for row in plain)
    assert len(everything) == 34


def test_aliases_are_llama_quantizes() -> None:
    assert find_qtype("q4_k").name == "Q4_K_M"
    assert find_backend("gguf-q5_k").name == "Q5_K_M"


def test_an_unknown_name_is_a_usage_error_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="did you mean q4_k_m"):
        find_qtype("q4km")
    with pytest.raises(UsageError, match="known: "):
        find_backend("zzz")


def test_lists_keep_order_and_drop_repeats() -> None:
    assert split_list(["q4_0,q8_0", "f16, q4_0", ""]) == ["q4_0", "q8_0", "f16"]
