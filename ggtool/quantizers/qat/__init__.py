"""Training that a quantization needs: token ids in a mapped file, and the loop with its checkpoints."""
