"""The engine: prompts of token ids in, logits or tokens out, for one model on one device.

A generation runs ahead of its reader: while some tokens are read the next ones are being made, so that neither stop
conditions nor printing hold up the GPU. What was made beyond a stop is thrown away.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence

import torch
from torch import Tensor

from ggtool.backends import SamplingParams
from ggtool.backends.engine import prompt as prompt_pass
from ggtool.backends.engine.model import Model
from ggtool.backends.engine.step import Run, Steps, runner
from ggtool.backends.huggingface.sampling import Sampler
from ggtool.backends.text_backend import StopReason
from ggtool.errors import MeasureError
from ggtool.kernels.decode import MAX_TEXTS, Launcher

# Steps of one graph, and graphs under way at once: the reader sees a text in pieces of so many tokens.
_STEPS_AT_ONCE = 8
_AHEAD = 2
_NOT_FINITE = "the model gave a logit that is not finite; no measurement of it means anything."


class Engine:
    """A model and the state of the texts that it continues. Not safe to share between threads."""

    def __init__(self, model: Model, launcher: Launcher, n_ctx: int, gpu: str) -> None:
        """Allocate the cache of one text of `n_ctx` tokens; gpu: the name that measured shapes are looked up by."""
        self.model, self.n_ctx = model, n_ctx
        self._launcher, self._gpu = launcher, gpu
        self._one = self._steps(1)
        self._many: tuple[Steps, Run] | None = None

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of keys and values of one text."""
        return self._one[0].cache_bytes

    @property
    def weights_bytes(self) -> int:
        """Bytes of all that is held but caches."""
        return self.model.weights_bytes

    def hidden(self, tokens: Sequence[int]) -> Tensor:
        """Return the final hidden states (len(tokens), n_embd) of one text, its keys and values in the cache."""
        ids = torch.tensor([tokens], device=self.model.device)
        with torch.inference_mode():
            return self._forward(ids, self._one[0])[0]

    def head(self, hidden: Tensor) -> Tensor:
        """Return float32 logits of hidden states; MeasureError where one is not finite."""
        with torch.inference_mode():
            logits = self._head_logits(hidden)
            if not bool(logits.isfinite().all()):
                raise MeasureError(_NOT_FINITE)
            return logits

    def generate(
        self, prompt: Sequence[int], params: SamplingParams, end_tokens: Sequence[int]
    ) -> Generator[int, None, StopReason]:
        """Yield new tokens of one text; return why there are no more. The likeliest are chosen where the model is."""
        sampler = Sampler(params, prompt, end_tokens)
        first = sampler.choose(self.head(self.hidden(prompt)[-1:])[0].cpu())
        if params.temperature == 0 and params.repeat_penalty == 1:
            makes = self._greedy(
                first, len(prompt), params.n_predict, list(end_tokens) if params.ignore_eos else []
            )
        else:
            makes = self._sampled(first, len(prompt), sampler)
        for made, token in enumerate(makes, 1):
            if token in end_tokens:
                return "eog"
            yield token
            if made == params.n_predict:
                return "length"
        return "context"

    def generate_batch(self, prompts: Sequence[Sequence[int]], n_predict: int) -> Iterator[list[int]]:
        """Yield the likeliest next token of each prompt, step by step; all of one length, MAX_TEXTS prompts at a time."""
        if len(prompts) > MAX_TEXTS:
            halves = [
                self._batch(prompts[at : at + MAX_TEXTS], n_predict)
                for at in range(0, len(prompts), MAX_TEXTS)
            ]
            rows = [list(half) for half in halves]
            yield from ([token for row in step for token in row] for step in zip(*rows, strict=True))
            return
        yield from self._batch(prompts, n_predict)

    def _batch(self, prompts: Sequence[Sequence[int]], n_predict: int) -> Iterator[list[int]]:
        if self._many is None or self._many[0].n_texts != len(prompts):
            self._many = None  # its cache is freed before the next one is made
            self._many = self._one if len(prompts) == 1 else self._steps(len(prompts))
        steps, run = self._many
        ids = torch.tensor(prompts, device=self.model.device)
        with torch.inference_mode():
            hidden = self._forward(ids, steps)
        first = self.head(hidden[:, -1]).argmax(-1)
        del hidden
        yield first.tolist()
        if n_predict > 1:
            yield from self._run_ahead(steps, run, first, ids.shape[1], n_predict - 1)

    def _forward(self, ids: Tensor, steps: Steps) -> Tensor:
        return prompt_pass.forward(self.model, self._launcher, ids, steps.cache)

    def _head_logits(self, hidden: Tensor) -> Tensor:
        return prompt_pass.head_logits(self.model, self._launcher, hidden)

    def _steps(self, n_texts: int) -> tuple[Steps, Run]:
        steps = Steps(self.model, self._launcher, n_texts, self.n_ctx, self._gpu)
        return steps, runner(steps)

    def _greedy(self, first: int, n_prompt: int, n_predict: int, banned: list[int]) -> Iterator[int]:
        steps, run = self._one
        yield first
        n_more = min(n_predict - 1, self.n_ctx - n_prompt)
        if n_more < 1:
            return
        steps.forbid(banned)
        token = torch.tensor([first], device=self.model.device)
        for row in self._run_ahead(steps, run, token, n_prompt, n_more):
            yield row[0]

    def _sampled(self, first: int, n_prompt: int, sampler: Sampler) -> Iterator[int]:
        """Yield tokens that are drawn on the CPU from each step's logits."""
        steps, run = self._one
        steps.forbid([])
        token = first
        yield token
        for position in range(n_prompt, self.n_ctx):
            with torch.inference_mode():
                steps.begin(torch.tensor([token]), position)
                run(1, steps.n_runs(position + 1))
                logits = steps.all_logits()[0]
            if not bool(logits.isfinite().all()):
                raise MeasureError(_NOT_FINITE)
            token = sampler.choose(logits)
            yield token

    def _run_ahead(
        self, steps: Steps, run: Run, first: Tensor, n_prompt: int, n_more: int
    ) -> Iterator[list[int]]:
        """Yield the tokens of `n_more` steps after token `first` at position `n_prompt`, made before they are asked for."""
        is_gpu = self.model.device.type == "cuda"
        with torch.inference_mode():
            steps.begin(first, n_prompt)
        under_way: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        at, end = n_prompt, n_prompt + n_more
        while at < end or under_way:
            while at < end and len(under_way) < _AHEAD:
                n_steps = min(_STEPS_AT_ONCE, end - at)
                with torch.inference_mode():
                    for n_now in [n_steps] if n_steps == _STEPS_AT_ONCE else n_steps * [1]:
                        run(n_now, steps.n_runs(at + n_steps))
                    made = torch.empty(n_steps, steps.n_texts, dtype=torch.int32, pin_memory=is_gpu)
                    made.copy_(steps.made[at : at + n_steps], non_blocking=True)
                    event = torch.cuda.Event() if is_gpu else None  # type: ignore[no-untyped-call]  # torch forgot to annotate it
                    if event is not None:
                        event.record()
                under_way.append((made, event))
                at += n_steps
            made, event = under_way.popleft()
            if event is not None:
                event.synchronize()
            for row in made.tolist():
                if min(row) < 0:
                    raise MeasureError(_NOT_FINITE)
                yield row
