"""SamplingParams as a chain of llama.cpp's samplers, in the order of its own tools.

penalties, top_k, top_p, min_p, temperature, then a draw with `seed`; temperature 0 takes the likeliest token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import llama_cpp.llama_cpp as lib

from ggtool.backends import SamplingParams
from ggtool.backends.llama_cpp.model import Pointer
from ggtool.backends.llama_cpp.vocab import Vocabulary
from ggtool.backends.sampling import PENALTY_LAST_N


@contextmanager
def sampler_chain(params: SamplingParams, vocabulary: Vocabulary, prompt: Sequence[int]) -> Iterator[Pointer]:
    """Yield a llama_sampler for one generation after `prompt`; it is freed on the way out."""
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    try:
        for sampler in _samplers(params, vocabulary):
            lib.llama_sampler_chain_add(chain, sampler)  # the chain frees it
        for token in prompt[-PENALTY_LAST_N:]:
            lib.llama_sampler_accept(chain, token)
        yield chain
    finally:
        lib.llama_sampler_free(chain)


def _samplers(params: SamplingParams, vocabulary: Vocabulary) -> Iterator[Pointer]:
    if params.ignore_eos:
        # As llama.cpp's own --ignore-eos: the tokens are made impossible, so the text goes on.
        banned = [lib.llama_logit_bias(token, -math.inf) for token in vocabulary.eog_tokens]
        biases = (lib.llama_logit_bias * len(banned))(*banned)
        yield lib.llama_sampler_init_logit_bias(vocabulary.n_tokens, len(banned), biases)
    if params.repeat_penalty != 1.0:
        yield lib.llama_sampler_init_penalties(
            vocabulary.n_tokens, PENALTY_LAST_N, params.repeat_penalty, 0.0, 0.0
        )
    if params.temperature == 0.0:
        yield lib.llama_sampler_init_greedy()
        return
    yield lib.llama_sampler_init_top_k(params.top_k)
    yield lib.llama_sampler_init_top_p(params.top_p, 1)
    yield lib.llama_sampler_init_min_p(params.min_p, 1)
    yield lib.llama_sampler_init_temp(params.temperature)
    yield lib.llama_sampler_init_dist(params.seed)
