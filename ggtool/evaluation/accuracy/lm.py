"""GgtoolLM: a format of ggtool as a model of lm-eval, `--model ggtool` once `register` was called (`ggtool lm-eval` does).

ggtool lm-eval --model ggtool --model_args pretrained=./my-gpt2,backend=gguf-q4_k_m --tasks hellaswag
"""

from __future__ import annotations

from itertools import groupby
from typing import cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import model_registry
from tqdm import tqdm

from ggtool.backends import LoadOptions, open_backend
from ggtool.backends.device import choose_device
from ggtool.evaluation.accuracy.encoding import Encoder
from ggtool.evaluation.accuracy.lm_tasks import generation
from ggtool.evaluation.accuracy.open_format import find_format
from ggtool.evaluation.accuracy.scoring import SpeakingBackend, continue_items, score_items, score_texts
from ggtool.system.machine import usable_cpus

MODEL_NAME = "ggtool"


class GgtoolLM(LM):  # type: ignore[misc]  # lm-eval ships no types
    """One format of one model; its token ids are those that an evaluation gives all formats.

    pretrained: a checkpoint's folder or repo id; backend: a format's name, or a model on disk, which needs no
    `pretrained`. n_ctx 0 is the model's own context, 4096 at most, threads 0 all CPUs. A GPU is used where torch sees one, unless the
    device is "cpu". Batches are ggtool's own.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        backend: str = "hf-fp32",
        revision: str | None = None,
        n_ctx: int = 0,
        threads: int = 0,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """Make what the format needs, into ggtool's cache, and load it. Raises what `ggtool eval` raises."""
        super().__init__()
        del batch_size, max_batch_size  # lm-eval passes them to every model
        # "cuda:0" is what lm-eval's command line passes where no device was named.
        where = choose_device("cpu" if device == "cpu" else "auto")
        found = find_format(backend, pretrained, revision, where)
        options = LoadOptions(
            int(n_ctx),
            int(threads) or usable_cpus(),
            found.device,
            found.components,
            engine="eager",
            exact=True,
        )
        self.backend = cast(SpeakingBackend, open_backend(found.format, found.path, options))
        self.encoder = Encoder(found.vocabulary or self.backend.vocabulary)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation and whether it is greedy; an item's requests share their beginning."""
        items = [
            [self.encoder.pair(*one.args) for one in item]
            for _, item in groupby(requests, key=lambda one: (one.task_name, one.doc_id))
        ]
        with _bar("log-likelihoods", disable_tqdm) as bar:
            answers = [answer for item in score_items(self.backend, items, bar.show) for answer in item]
        for one, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", one.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, from its first token on, behind BOS or the end-of-text token."""
        texts = [(self.encoder.whole(one.args[0]), self.encoder.prefix) for one in requests]
        with _bar("whole texts", disable_tqdm) as bar:
            totals = [total for total, _ in score_texts(self.backend, texts, bar.show)]
        for one, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", one.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that the model writes behind each prompt, without what stopped it."""
        prompts = [
            [generation(tuple(self.encoder.text(context)), given)]
            for context, given in (one.args for one in requests)
        ]
        with _bar("texts", disable_tqdm) as bar:
            texts = [text for (text,) in continue_items(self.backend, prompts, bar.show)]
        for one, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", one.args, text)
        return texts

    def close(self) -> None:
        """Free the model."""
        self.backend.close()


class _bar:  # noqa: N801 - used as a function
    """A progress bar for a block, moved by ggtool's progress."""

    def __init__(self, what: str, disabled: bool) -> None:
        self._bar = tqdm(desc=what, disable=disabled)

    def __enter__(self) -> _bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, done: int, total: int) -> None:
        """Move it."""
        self._bar.total = total
        self._bar.update(done - self._bar.n)


def register() -> None:
    """Tell lm-eval of the model; its registry is a table of its own package and looks for no others."""
    if MODEL_NAME not in model_registry:
        import lm_eval.models  # noqa: F401 - fills the registry, which must not be empty before its own models are in it

        model_registry.register(MODEL_NAME, target=f"{__name__}:{GgtoolLM.__name__}")
