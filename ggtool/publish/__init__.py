"""Folders of GGUF files to and from the Hub: what would go, what went, and that it is the same on both sides.

The protocol is huggingface_hub's. What is compared is content: sha256 where the Hub keeps it (large files), the
Git blob's hash elsewhere.
"""
