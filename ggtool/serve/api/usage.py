"""What a response cost: tokens, those that were in the KV cache, and times."""

from __future__ import annotations

from typing import Any

from ggtool.serve.engine.process import Event


class Usage:
    """Sums over the texts of one response; `n` texts share each prompt, which counts once."""

    def __init__(self, n: int = 1) -> None:
        self.n = n
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0
        self.prompt_s = self.predict_s = 0.0

    def add(self, index: int, event: Event) -> None:
        """Take an event of text number `index`."""
        if event[0] == "started" and index % self.n == 0:
            self.prompt_tokens += event[2]
            self.cached_tokens += event[3]
        elif event[0] == "end":
            self.completion_tokens += event[4]
            self.prompt_s, self.predict_s = max(self.prompt_s, event[5]), max(self.predict_s, event[6])

    def json(self) -> dict[str, Any]:
        """Return OpenAI's usage."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def timings(usage: Usage) -> dict[str, Any]:
    """Return times as llama-server names them: until the first token, and from there on, which has one token less."""
    read = usage.prompt_tokens - usage.cached_tokens
    made = max(usage.completion_tokens - 1, 0)
    return {
        "cache_n": usage.cached_tokens,
        "prompt_n": read,
        "prompt_ms": round(usage.prompt_s * 1e3, 3),
        "prompt_per_second": round(read / usage.prompt_s, 2) if usage.prompt_s > 0 else None,
        "predicted_n": usage.completion_tokens,
        "predicted_ms": round(usage.predict_s * 1e3, 3),
        "predicted_per_second": round(made / usage.predict_s, 2) if usage.predict_s > 0 and made else None,
    }
