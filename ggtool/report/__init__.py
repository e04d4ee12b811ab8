"""Records turned into what a person reads. Knows records and nothing of how they were measured."""
