"""EvalRecord, the parts it is made of, and the append-only store of them.

Plain numbers and short strings only, so that a record means the same to a reader in any language.
SCHEMA names the meaning of the numbers; it is bumped when a meaning changes, and the reason goes here:
    1  first version
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ggtool.errors import OutputError

SCHEMA = 1


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of one token stream under one named protocol; `docs/method.md` defines each number.

    A *_stderr is the standard error of the number it is named after, by the delta method from the spread of
    token losses (nll, nats). word_ppl is None for a text whose words no blanks divide. n_tokens, n_words and n_bytes count what was scored, not what was read.
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
class Speed:
    """Latency of one backend in a process of its own, after warm-up; medians of `repetitions` runs.

    pp: prompt processing of `pp_tokens` at once, tokens/s. tg: generation of `tg_tokens` one by one after
    a prompt of `tg_depth`, tokens/s. ttft_s: a prompt of `pp_tokens` until its first new token, seconds.
    load_s: opening the weights, seconds, once, imports excluded. Raw samples are seconds.
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


@dataclass(frozen=True)
class MemoryUsage:
    """Bytes held by one backend, measured in a process that measures nothing else.

    weights_bytes counts unique storages: codes, scales, codebooks, biases and what was left unquantized.
    Peaks are the kernel's own (VmHWM), file-backed pages of a mapped model included; base_rss_bytes is
    what the interpreter and its libraries took before the model. peak_vram_bytes is None without CUDA.
    """

    weights_bytes: int
    kv_cache_bytes: int
    base_rss_bytes: int
    load_peak_rss_bytes: int
    peak_rss_bytes: int
    peak_vram_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """One format of one model, measured. A failed measurement keeps its row, with the reason in `failure`.

    model_size is what the loaded model holds (`Footprint.weights_bytes`), bpw = 8 * model_size /
    model_n_params. modules_quantized of modules_total shows a quantizer that silently skipped everything.
    text_sha256 and tokens_sha256 pin the corpus and the ids that every format was given.
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
    schema: int = SCHEMA

    @property
    def label(self) -> str:
        """The format with its selector, as typed after --backend."""
        return label(self.format, self.components)

    def to_json(self) -> str:
        """Return the record as one line of JSON. Non-finite numbers never get here: measuring refuses them."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvalRecord:
        """Rebuild a record from parsed JSON; unknown keys raise TypeError, as a newer schema should."""
        return cls(**{name: part_from_dict(name, value) for name, value in data.items()})


def label(backend: str, components: str) -> str:
    """Return "scratch-int8:attn" for a part of a model, "scratch-int8" for all of it."""
    return backend if components == "all" else f"{backend}:{components}"


def part_from_dict(name: str, value: Any) -> Any:
    """Rebuild one field of a record from parsed JSON: a part becomes its dataclass, the rest stays as it is."""
    if name not in PARTS or value is None:
        return value
    return PARTS[name](**{key: tuple(v) if isinstance(v, list) else v for key, v in value.items()})


PARTS: Mapping[str, type] = MappingProxyType(
    {"perplexity": Perplexity, "divergence": Divergence, "speed": Speed, "memory": MemoryUsage}
)


class ResultStore:
    """Records in a JSON Lines file. Appending is one locked write, so a killed run loses nothing finished."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: EvalRecord) -> None:
        """Add one record and flush it to the disk; OutputError if the file cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                line = record.to_json().encode() + b"\n"
                if file.tell() and not _ends_in_newline(file.fileno(), file.tell()):
                    line = b"\n" + line  # closes a line torn by a kill
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot append to {self.path}: {error.strerror}.") from error

    def __iter__(self) -> Iterator[EvalRecord]:
        """Yield the records of this schema, oldest first; lines torn by a kill are passed over."""
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    data = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if isinstance(data, dict) and data.get("schema") == SCHEMA:
                    yield EvalRecord.from_dict(data)


def _ends_in_newline(descriptor: int, size: int) -> bool:
    return os.pread(descriptor, 1, size - 1) == b"\n"
