"""One number each: a Backend and tokens in, a frozen dataclass out. How each is made: docs/method.md."""
