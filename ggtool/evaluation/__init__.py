"""One harness for all formats: request, plan, measuring tasks, metrics, records' keys, experiments and presets."""
