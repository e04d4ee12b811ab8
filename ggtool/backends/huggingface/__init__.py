"""The Hugging Face runtime: float, bitsandbytes and from-scratch formats of a checkpoint, by transformers and torch."""
