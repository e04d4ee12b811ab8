"""The facts of a model card as plain values: files, their model, and the records that measured them.

Nothing here opens a model. Files are matched with records by sha256 alone, so a number never
stands beside a file that it was not measured on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ggtool.results.records import EvalRecord

# Fields that two perplexities must share to be compared in one table.
Protocol = tuple[str, str, int, int, int]


@dataclass(frozen=True)
class CardFile:
    """One model in one format: `parts` are (name, bytes, sha256) of its files, `sha256` what records know it by.

    qtype is the quant type's name, bpw its bits per weight over all tensors, imatrix whether one was used, method
    what the file says of how its weights were rounded ("gptq: ..." or "refined: ..."), empty for llama.cpp's own rounding.
    """

    qtype: str
    bpw: float
    imatrix: bool
    sha256: str
    parts: tuple[tuple[str, int, str], ...]
    method: str = ""

    @property
    def name(self) -> str:
        """The name to open; of a split model the first part's."""
        return self.parts[0][0]

    @property
    def n_bytes(self) -> int:
        """The size of all parts."""
        return sum(n_bytes for _, n_bytes, _ in self.parts)

    @property
    def label(self) -> str:
        """The quant type, and what went into it beside: error feedback, or an importance matrix."""
        if self.method:
            return f"{self.qtype} + {self.method.partition(':')[0]}"
        return f"{self.qtype} + imatrix" if self.imatrix else self.qtype


@dataclass(frozen=True)
class DatasetId:
    """A corpus as the Hub knows it."""

    repo_id: str
    config: str | None
    split: str
    revision: str


@dataclass(frozen=True)
class CardModel:
    """The model: `base_model` is the original's repo id, empty if unknown; so are revision and licence.

    repo is OWNER/NAME of the repo that the files are for.
    license, license_name and license_link are the original's. `chat` is whether the files hold a chat template.
    corpora: name in records -> the Hub's data set, for those that have one.
    """

    name: str
    repo: str
    architecture: str
    n_params: int
    context_length: int
    chat: bool
    base_model: str = ""
    revision: str = ""
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    languages: tuple[str, ...] = ()
    corpora: Mapping[str, DatasetId] = field(default_factory=dict)

    @property
    def repo_name(self) -> str:
        """The NAME of OWNER/NAME."""
        return self.repo.rpartition("/")[2]


@dataclass(frozen=True)
class Row:
    """A file and the newest records of it: `quality` under the card's protocol, `speed`; None where there is none."""

    file: CardFile
    quality: EvalRecord | None
    speed: EvalRecord | None


@dataclass(frozen=True)
class Measured:
    """Every file with its records, `all_quality` the newest record of each file under each protocol."""

    rows: tuple[Row, ...]
    all_quality: tuple[tuple[CardFile, EvalRecord], ...]

    @property
    def quality(self) -> EvalRecord | None:
        """Any record of the card's protocol, to describe it by."""
        return next((row.quality for row in self.rows if row.quality), None)


def match(files: Sequence[CardFile], records: Sequence[EvalRecord]) -> Measured:
    """Match each file with its newest records, of the protocol that most files were measured with."""
    newest: dict[tuple[str, Protocol], EvalRecord] = {}
    speeds: dict[str, EvalRecord] = {}
    known = {file.sha256 for file in files}
    order: list[Protocol] = []
    for record in records:  # oldest first, as the store keeps them
        if record.artifact_sha256 not in known:
            continue
        if (protocol := _protocol(record)) is not None:
            newest[record.artifact_sha256, protocol] = record
            order.append(protocol)
        if record.speed is not None:
            speeds[record.artifact_sha256] = record
    covered = Counter(protocol for _, protocol in newest)
    chosen = max(covered, key=lambda one: (covered[one], _last(order, one)), default=None)
    rows = tuple(
        Row(file, newest.get((file.sha256, chosen)) if chosen else None, speeds.get(file.sha256))
        for file in files
    )
    everything = tuple(
        (file, record) for file in files for (sha256, _), record in newest.items() if sha256 == file.sha256
    )
    return Measured(rows, everything)


def _last(order: Sequence[Protocol], protocol: Protocol) -> int:
    return len(order) - 1 - order[::-1].index(protocol)


def _protocol(record: EvalRecord) -> Protocol | None:
    if (ppl := record.perplexity) is None:
        return None
    return record.tokens_sha256, ppl.protocol, ppl.n_ctx, ppl.stride, ppl.n_tokens
