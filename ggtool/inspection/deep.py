"""A model's predictions compared with a reference's: what no look at the bytes can tell.

Both read the same text in the model's own token ids, in a process of their own, side by side; the numbers are those of
`ggtool.evaluation.metrics.divergence`.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ggtool.backends import LoadOptions, open_backend
from ggtool.errors import UsageError
from ggtool.formats import FORMATS
from ggtool.gguf.model import open_artifact
from ggtool.system.progress import Progress
from ggtool.system.worker import Outcome, run

_N_CTX = 512
_TIMEOUT_S = 3600.0

# Plain sentences of several kinds; about 350 tokens in most vocabularies.
SAMPLE = """\
The river rises in the hills to the north of the town and flows for about forty miles before it reaches the sea. In the \
nineteenth century a canal was built along its lower course, so that coal could be brought to the mills; it was closed in \
1931, and parts of it are now a footpath. The bridge at the market place, which has three arches of grey stone, was finished \
in 1784 and widened twice since.

A function that calls itself must have a case in which it does not. If n is zero the answer is one; otherwise it is n times \
the answer for n minus one. For 5 this gives 120, and for 10 it gives 3,628,800.

"Have you seen my keys?" she asked. "They were on the table this morning." He looked up from the newspaper, thought for a \
moment, and shook his head. "Perhaps the children took them. They were playing in the kitchen when I came in." She sighed \
and opened the drawer again, although she had looked there twice already.

To make the dough, mix the flour with the salt, add the water little by little, and knead it until it no longer sticks to \
the hands. Leave it in a warm place for two hours. The oven should be hot before the bread goes in, and the crust is done \
when it sounds hollow.

Water boils at a lower temperature on a mountain than at the coast because the pressure of the air is less. The same is true \
of most liquids, and the difference can be calculated from the heat that is needed to turn them into vapour.
"""


@dataclass(frozen=True)
class DeepJob:
    """Compare the GGUF at `path` with `reference`, another one or a checkpoint's folder, on `text`."""

    runs: ClassVar[str] = "ggtool.inspection.deep:answer"
    task: ClassVar[str] = "deep comparison"

    path: Path
    reference: Path
    text: str
    threads: int


def compare_predictions(path: Path, reference: Path, threads: int, text: str = SAMPLE) -> dict[str, Any]:
    """Return kld_mean, kld_max, same_top, ppl_ratio, ppl_reference and n_tokens; raises MeasureError with the child's reason."""
    if not reference.exists():
        raise UsageError(f"there is no reference {reference}; give a .gguf file or a checkpoint's folder.")
    outcome = run(DeepJob(path.resolve(), reference.resolve(), text, threads), timeout_s=_TIMEOUT_S)
    return outcome.numbers


def answer(job: DeepJob, progress: Progress) -> Outcome:
    """Do the job; runs in the child."""
    from ggtool.backends.llama_cpp.vocab import tokenize_with
    from ggtool.evaluation.metrics.divergence import compare, summarize
    from ggtool.evaluation.metrics.windows import cut

    tokens = tokenize_with(job.path, job.text)
    keys = open_artifact(job.path).header.metadata
    n_ctx = min(_N_CTX, int(keys.get(f"{keys.get('general.architecture')}.context_length", _N_CTX)))
    options = LoadOptions(n_ctx, job.threads)
    # What format a GGUF file is in it says itself; a folder is computed in float32.
    formats = [
        FORMATS["gguf-f16" if place.suffix == ".gguf" else "hf-fp32"] for place in (job.path, job.reference)
    ]
    windows = cut("full", len(tokens.ids), n_ctx)
    with (
        closing(open_backend(formats[0], job.path, options)) as ours,
        closing(open_backend(formats[1], job.reference, options)) as theirs,
    ):
        found = compare(ours, theirs, tokens.ids, windows, bos=None, progress=progress)
    measured = summarize(found, reference=job.reference.name, reference_sha256="")
    return Outcome(
        {
            "n_tokens": measured.n_tokens,
            "kld_mean": measured.kld_mean,
            "kld_max": measured.kld_max,
            "same_top": measured.same_top,
            "ppl_ratio": measured.ppl_ratio,
            "ppl_reference": measured.ppl_reference,
        },
        {},
        {},
    )
