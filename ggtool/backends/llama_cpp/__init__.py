"""The llama.cpp runtime: GGUF files through the C API of the library that llama-cpp-python ships, or LLAMA_CPP_LIB_PATH names."""

from ggtool.system.llama_library import load_chosen_library

load_chosen_library()
