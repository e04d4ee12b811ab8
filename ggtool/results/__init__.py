"""Measurement records, the store that keeps them, and the facts and texts that a report shows beside them."""
