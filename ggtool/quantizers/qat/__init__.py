"""Quantization-aware training: token ids in a mapped file, the training loop, and its checkpoints."""
