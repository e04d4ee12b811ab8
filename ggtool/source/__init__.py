"""Checkpoints: where they come from and how their tensors are read, from safetensors or (if allowed) pickles."""
