"""Talking to a GGUF model: `ggtool chat` at a terminal or in a pipe, and `ggtool generate`.

A model with a chat template answers messages in its own format. A base model has none, gets none, and
continues the text instead.
"""

from ggtool.chat.run import run_chat, run_generate

__all__ = ["run_chat", "run_generate"]
