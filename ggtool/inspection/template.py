"""A chat template shown on a sample conversation, in a process that has nothing to lose.

`ggtool.chat.template` keeps a template in Jinja's sandbox and counts its steps. Here, where a file is looked at for the first
time, it also gets a process of its own that can open no file, start no process, and has a limit of memory and of processor
time: what one call into C may take is bounded by nothing less.
"""

from __future__ import annotations

import resource
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

from ggtool.errors import ArtifactError, MeasureError
from ggtool.gguf.header import GGUFHeader
from ggtool.inspection.tokenizer import summarize
from ggtool.system.progress import Progress
from ggtool.system.worker import Outcome, run

SAMPLE = (
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Where is Paris?"},
    {"role": "assistant", "content": "In France."},
    {"role": "user", "content": "And Rome?"},
)
_WARM_UP = (
    "{% macro m(x) %}{{ x|tojson }}{% endmacro %}{{ m(1)|trim|upper|urlize }}{{ strftime_now('%c') }}",
    "{% for m in messages|map(attribute='role')|sort|unique %}{{ loop.index ~ m }}{% break %}{% endfor %}",
    "{{ raise_exception('') }}",
    "{{ ''.__class__ }}",
    "{{ 1 / 0 }}",
    "{{ nothing.at.all }}",
    "{% import 'x' as x %}",
    "{% for %}",
)
_MEMORY_BYTES, _CPU_S, _TIMEOUT_S = 512 << 20, 5, 30.0
_SHOWN_CHARS = 100_000


@dataclass(frozen=True)
class TemplateJob:
    """Render `source` on SAMPLE."""

    runs: ClassVar[str] = "ggtool.inspection.template:answer"
    task: ClassVar[str] = "chat template"
    threads: ClassVar[int] = 1

    source: str
    bos: str
    eos: str


def sample(header: GGUFHeader) -> str:
    """Render the header's template on SAMPLE, without the system message where it refuses one.

    Raises ArtifactError where it is not valid, fails, reaches for what it must not, or ended the process it ran in.
    """
    names = {token.role: token.text for token in summarize(header).special}
    source = str(header.metadata["tokenizer.chat_template"])
    try:
        outcome = run(TemplateJob(source, names.get("bos", ""), names.get("eos", "")), timeout_s=_TIMEOUT_S)
    except MeasureError as error:
        # Killed by one of the limits: by its time, or where memory had ended.
        raise ArtifactError(f"the model's chat template takes too long or too much memory: {error}") from None
    if "error" in outcome.numbers:
        raise ArtifactError(outcome.numbers["error"])
    return str(outcome.numbers["text"])


def answer(job: TemplateJob, _progress: Progress) -> Outcome:
    """Do the job; runs in the child."""
    from ggtool.chat.template import render

    # Everything that a rendering opens, imports or looks up, its failures too, while that is still possible.
    for source in _WARM_UP:
        with suppress(ArtifactError):
            render(source, SAMPLE, "", "")
    _limit()
    try:
        try:
            text = render(job.source, SAMPLE, job.bos, job.eos)
        except ArtifactError:
            text = render(job.source, SAMPLE[1:], job.bos, job.eos)
    except ArtifactError as error:
        return Outcome({"error": str(error)}, {}, {})
    return Outcome({"text": text[:_SHOWN_CHARS]}, {}, {})


def _limit() -> None:
    """Take from this process, for good, whatever a rendering does not need."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123  # the last file it opens
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + _CPU_S
    for what, most in (
        (resource.RLIMIT_AS, mapped + _MEMORY_BYTES),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 0),
    ):
        resource.setrlimit(what, (most, most))
