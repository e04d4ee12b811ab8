"""A checkpoint: where it comes from, and its tensors, read lazily from safetensors or (if allowed) pickles."""
