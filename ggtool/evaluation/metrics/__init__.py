"""Metrics: each takes a Backend and tokens and returns a frozen dataclass. docs/method.md defines the numbers."""
