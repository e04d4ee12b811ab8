"""Ground that everything stands on: atomic writes, cache, file hashes, machine facts, child processes, progress."""
