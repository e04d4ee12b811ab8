"""What the machine gives: atomic writes, the cache, files and their hashes, facts of the machine, child processes."""
