"""Hugging Face checkpoints to GGUF: architectures, vocabularies, metadata, tensor types, and the pass that writes."""
