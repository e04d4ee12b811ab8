"""Publish folders of GGUF files: model card, Modelfile, push to and pull from the Hub.

The protocol is huggingface_hub's. Both sides are compared by content: by sha256 for large files, by the Git blob's
hash for the others.
"""
