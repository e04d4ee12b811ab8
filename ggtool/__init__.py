"""ggtool converts Hugging Face checkpoints to GGUF, runs them, and measures every format alike.

Nothing is imported here: `ggtool --help` answers before torch or llama.cpp could load.
"""

__version__ = "0.1.0"
