"""The evaluation harness: request, plan, measuring tasks, metrics, record keys, experiments and presets."""
