"""GGUF back to a Hugging Face folder: the rows of `ggtool.conversion.architectures` read from right to left."""
