"""What was measured: records, the store that keeps them, the facts and texts that a report shows beside them."""
