"""Looking into a GGUF file and deciding whether to trust it: facts, statistics, bytes, checks, the page that shows them."""
