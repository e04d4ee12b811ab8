"""The GGUF file format: header reader, writer, tensor types, importance matrices, an opened model file."""
