import pytest

from ggtool.errors import UsageError
from ggtool.formats import FORMATS, find_backend, find_qtype, qtypes, split_list


def test_every_row_is_found_by_the_name_it_is_typed_by() -> None:
    for name, row in FORMATS.items():
        assert find_backend(name) is row
        assert find_backend(name.upper()) is row


def test_quant_types_agree_with_llama_cpp() -> None:
    from llama_cpp import llama_cpp

    for row in qtypes():
        prefix = "LLAMA_FTYPE_ALL_" if row.name == "F32" else "LLAMA_FTYPE_MOSTLY_"
        assert row.ftype == getattr(llama_cpp, prefix + row.name), row.name


def test_nominal_bits_agree_with_gguf() -> None:
    import gguf

    for row in qtypes():
        main = row.name.removesuffix("_S").removesuffix("_M").removesuffix("_L")
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[main]]
        assert row.bits == 8 * size / block, row.name


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
