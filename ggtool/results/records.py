"""EvalRecord: one format of one model, measured, and the parts that a record is made of.

Plain numbers and short strings only, so that a record means the same to a reader in any language.
SCHEMA is the version of what the numbers mean. It is raised when a meaning changes; the reasons:
    1  first version
    2  speed records what disturbed it (`Disturbance`); numbers of schema 1 mean the same, but were not watched
    3  answers to tasks (`ggtool.results.tasks`); all else is as before
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ggtool.formats import label
from ggtool.results.tasks import TaskResult

SCHEMA = 3
READABLE = frozenset({1, 2, 3})
# Of an environment: what ran on the machine's other GPUs while speed was timed.
BESIDE = "beside"


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of one token stream under one named protocol; `docs/method.md` defines each number.

    A *_stderr is the standard error of the number it is named after, by the delta method from the spread of
    token losses (nll, nats). word_ppl is None for a text without spaces between words. n_tokens, n_words and n_bytes count what was scored, not what was read.
    """

    ppl: float
    ppl_stderr: float
    word_ppl: float | None
    word_ppl_stderr: float | None
    byte_ppl: float
    byte_ppl_stderr: float
    bits_per_byte: float
    nll: float
    n_tokens: int
    n_words: float
    n_bytes: int
    n_chunks: int
    n_ctx: int
    stride: int
    protocol: str


@dataclass(frozen=True)
class Divergence:
    """Distance of a format's predictions from a reference's on the scored tokens of Perplexity.

    kld in nats; delta_p and same_top are fractions; ppl_ratio is ppl / reference ppl, its error from the
    paired losses. `reference` is the reference's format, reference_sha256 its artifact.
    """

    reference: str
    reference_sha256: str
    n_tokens: int
    kld_mean: float
    kld_stderr: float
    kld_median: float
    kld_p90: float
    kld_p95: float
    kld_p99: float
    kld_p999: float
    kld_max: float
    delta_p_mean: float
    delta_p_rms: float
    delta_p_rms_stderr: float
    same_top: float
    same_top_stderr: float
    ppl_ratio: float
    ppl_ratio_stderr: float
    ppl_reference: float


@dataclass(frozen=True)
class Disturbance:
    """Other load on the machine while speed was timed.

    `disturbed` of the `rounds` kept were disturbed, by the `causes`: "others" (other processes), "steal" (the
    hypervisor), "waiting" (threads ready to run without a CPU), "throttled" (a cgroup's CPU limit), "heat", "gpu" (work of
    others on the GPU). `repeated` counts the rounds that were timed again, those at other lengths included. wide: the numbers ("pp", "tg", "ttft")
    whose rounds differ by more than the method allows. loading: whether opening the model was disturbed.
    Shares lie between 0 and 1 and are those of the worst round kept: others and steal of the CPUs' time, waiting of the
    threads', throttled of the round's, gpu of the time around the rounds. heat counts slow-downs, switches involuntary
    context switches; the clocks are read after each round. None: the machine does not report it.
    """

    rounds: int
    disturbed: int
    repeated: int
    causes: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    loading: bool = False
    others: float | None = None
    steal: float | None = None
    waiting: float | None = None
    throttled: float | None = None
    heat: int | None = None
    switches: int | None = None
    gpu: float | None = None
    cpu_mhz_low: float | None = None
    cpu_mhz_high: float | None = None


@dataclass(frozen=True)
class Timing:
    """Repeated timings of one stage at one length; rates in tokens/s, samples in seconds.

    kind pp: a prompt of `n_tokens` at once. kind tg: `n_tokens` made one by one after `depth` others, 0 being the
    first token alone; with a `batch` above 1, `n_tokens` of each of so many texts together, and the rate is that of
    all. p5 is the slow end and p95 the fast one. disturbed: how many of the samples were.
    """

    kind: str
    n_tokens: int
    depth: int
    ts: float
    ts_p5: float
    ts_p95: float
    samples_s: tuple[float, ...]
    batch: int = 1
    disturbed: int = 0


@dataclass(frozen=True)
class Speed:
    """Latency of one backend in a process of its own, after warm-up; medians of `repetitions` runs.

    pp: prompt processing of `pp_tokens` at once, tokens/s. tg: generation of `tg_tokens` one by one after
    a prompt of `tg_depth`, tokens/s. ttft_s: a prompt of `pp_tokens` until its first new token, seconds.
    load_s: opening the weights, seconds, once, imports excluded. Raw samples are seconds, *_p5 and *_p95 their
    quantiles as rates (pp, tg) or seconds (ttft). timings: the same stages at other lengths. cpu_mhz, gpu_mhz: the
    clocks right after the timed rounds, None where the machine does not report them. disturbance is None in records of schema 1.
    """

    pp_ts: float
    tg_ts: float
    ttft_s: float
    load_s: float
    pp_tokens: int
    tg_tokens: int
    tg_depth: int
    repetitions: int
    threads: int
    pp_samples_s: tuple[float, ...] = ()
    tg_samples_s: tuple[float, ...] = ()
    ttft_samples_s: tuple[float, ...] = ()
    pp_ts_p5: float | None = None
    pp_ts_p95: float | None = None
    tg_ts_p5: float | None = None
    tg_ts_p95: float | None = None
    ttft_s_p5: float | None = None
    ttft_s_p95: float | None = None
    timings: tuple[Timing, ...] = ()
    cpu_mhz: float | None = None
    gpu_mhz: float | None = None
    disturbance: Disturbance | None = None

    @property
    def is_disturbed(self) -> bool:
        """Whether something else disturbed the main rounds or used the GPU; False in records of schema 1."""
        return bool(self.disturbance and self.disturbance.causes)

    @property
    def is_steady(self) -> bool:
        """Whether formats may be ranked by it: not disturbed, and the rounds close enough together."""
        return not self.is_disturbed and not (self.disturbance and self.disturbance.wide)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Speed:
        """Rebuild a Speed from parsed JSON, turning lists into tuples."""
        timings = tuple(Timing(**_with_tuples(timing)) for timing in data.get("timings", ()))
        watched = data.get("disturbance")
        disturbance = None if watched is None else Disturbance(**_with_tuples(watched))
        return cls(**{**_with_tuples(data), "timings": timings, "disturbance": disturbance})


@dataclass(frozen=True)
class MemoryUsage:
    """Bytes held by one backend, measured in a process that measures nothing else.

    weights_bytes counts unique storages: codes, scales, codebooks, biases and what was left unquantized.
    Peaks are the kernel's own (VmHWM), file-backed pages of a mapped model included; base_rss_bytes is
    what the interpreter and its libraries took before the model. pss (shared pages divided among those who share
    them), uss (private pages) and rss with its anonymous, file-backed and shared-memory parts are what is held
    after the last token. peak_vram_bytes is what torch reserved at most, peak_vram_allocated_bytes what tensors
    took of it, vram_process_bytes the driver's count; of all GPUs together,
    vram_bytes_by_device being what torch reserved at most on each of several. None: the machine does not report it.
    """

    weights_bytes: int
    kv_cache_bytes: int
    base_rss_bytes: int
    load_peak_rss_bytes: int
    peak_rss_bytes: int
    peak_vram_bytes: int | None = None
    prefill_peak_rss_bytes: int | None = None
    decode_peak_rss_bytes: int | None = None
    pss_bytes: int | None = None
    uss_bytes: int | None = None
    rss_bytes: int | None = None
    rss_anon_bytes: int | None = None
    rss_file_bytes: int | None = None
    rss_shmem_bytes: int | None = None
    peak_vram_allocated_bytes: int | None = None
    vram_process_bytes: int | None = None
    vram_bytes_by_device: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """One format of one model, measured. A failed measurement keeps its row, with the reason in `failure`.

    model_size is what the loaded model holds (`Footprint.weights_bytes`), bpw = 8 * model_size /
    model_n_params. modules_quantized of modules_total shows a quantizer that silently skipped everything.
    text_sha256 and tokens_sha256 pin the corpus and the ids that every format was given. source_sha256 is that of the
    checkpoint (`ModelSource.sha256`) that the format was made of; empty for a GGUF file, which does not say. keys: task ->
    `ggtool.evaluation.record_keys`' hash of all that its numbers depend on.
    """

    model: str
    revision: str
    format: str
    components: str
    artifact: str
    artifact_sha256: str
    model_size: int
    model_n_params: int
    bpw: float
    modules_quantized: int
    modules_total: int
    corpus: str
    text_sha256: str
    tokens_sha256: str
    perplexity: Perplexity | None
    divergence: Divergence | None
    speed: Speed | None
    memory: MemoryUsage | None
    environment: Mapping[str, str]
    test_time: str
    failure: str = ""
    source_sha256: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)
    tasks: tuple[TaskResult, ...] = ()
    schema: int = SCHEMA

    @property
    def label(self) -> str:
        """The format with its selector, as typed after --backend."""
        return label(self.format, self.components)

    def find_task(self, name: str) -> TaskResult | None:
        """Return the answers to a task, if it was asked."""
        return next((result for result in self.tasks if result.task == name), None)

    def to_json(self) -> str:
        """Return the record as one line of JSON; ValueError for a number that is not finite."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvalRecord:
        """Rebuild a record from parsed JSON; TypeError for unknown keys, as in records of a newer schema."""
        return cls(**{name: part_from_dict(name, value) for name, value in data.items()})


def part_from_dict(name: str, value: Any) -> Any:
    """Rebuild one field of a record from parsed JSON; parts become dataclasses, other values are returned unchanged."""
    if name == "tasks":
        return tuple(TaskResult.from_dict(one) for one in value)
    if name not in PARTS or value is None:
        return value
    return Speed.from_dict(value) if name == "speed" else PARTS[name](**_with_tuples(value))


def _with_tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


PARTS: Mapping[str, type] = MappingProxyType(
    {"perplexity": Perplexity, "divergence": Divergence, "speed": Speed, "memory": MemoryUsage}
)
