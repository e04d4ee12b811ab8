"""The llama.cpp runtime: GGUF files through the C API of the library that llama-cpp-python ships."""
