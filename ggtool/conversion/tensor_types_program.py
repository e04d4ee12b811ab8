"""Child program of `tensor_types`: logs the tensor types that llama.cpp would choose for a file.

    python tensor_types_program.py LIBLLAMA FILE RULES FTYPE...

RULES is a JSON object: the fields of `QuantizeParams` to set, `tensor_types` as [regular expression, number] pairs.

llama.cpp answers in its log, on stderr; a line `@FTYPE` precedes each answer. It runs in a child process because an
assertion in native code would abort the caller and because the log callback is global. It imports only the standard
library, so it starts in a few hundredths of a second.
"""

import ctypes
import json
import os
import sys
from typing import Any

_N_TYPES_MAX = 1 << 10  # a number that is no tensor type's terminates the list


class QuantizeParams(ctypes.Structure):
    """`struct llama_model_quantize_params` of llama.h, as the pinned llama.cpp has it."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        ("allow_requantize", ctypes.c_bool),
        ("quantize_output_tensor", ctypes.c_bool),
        ("only_copy", ctypes.c_bool),
        ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool),
        ("dry_run", ctypes.c_bool),
        ("imatrix", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p),
        ("tt_overrides", ctypes.c_void_p),
        ("prune_layers", ctypes.c_void_p),
        ("max_buf_size", ctypes.c_size_t),
    )


class ImatrixData(ctypes.Structure):
    """`struct llama_model_imatrix_data` of llama.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.POINTER(ctypes.c_float)),
        ("size", ctypes.c_size_t),
    )


class TensorOverride(ctypes.Structure):
    """`struct llama_model_tensor_override` of llama.h."""

    _fields_ = (("pattern", ctypes.c_char_p), ("type", ctypes.c_int))


def main(library: str, file: str, rules: dict[str, Any], ftypes: list[str]) -> int:
    """Log one dry run per ftype; return 1 as soon as llama.cpp refuses one."""
    llama = ctypes.CDLL(library)
    llama.llama_model_quantize_default_params.restype = QuantizeParams
    llama.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(QuantizeParams)]
    llama.llama_model_quantize.restype = ctypes.c_uint32
    params = llama.llama_model_quantize_default_params()
    params.dry_run = True
    pairs = [TensorOverride(pattern.encode(), number) for pattern, number in rules.pop("tensor_types")]
    overrides = (TensorOverride * (len(pairs) + 1))(*pairs, TensorOverride(None, _N_TYPES_MAX))
    params.tt_overrides = ctypes.cast(overrides, ctypes.c_void_p) if pairs else None
    # Whether there is an importance matrix changes some choices; its values do not.
    entries = (ImatrixData * 2)(ImatrixData(b"any", (ctypes.c_float * 1)(1.0), 1), ImatrixData(None, None, 0))
    params.imatrix = ctypes.cast(entries, ctypes.c_void_p) if rules.pop("imatrix") else None
    for field, value in rules.items():
        setattr(params, field, value)
    for ftype in ftypes:
        os.write(2, f"\n@{ftype}\n".encode())
        params.ftype = int(ftype)
        if llama.llama_model_quantize(file.encode(), b"", ctypes.byref(params)):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4:]))
