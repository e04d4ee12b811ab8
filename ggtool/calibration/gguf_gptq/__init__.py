"""Round a checkpoint's matrices to GGUF's tensor types with error feedback (GPTQ), block by block: `--method gptq`."""
