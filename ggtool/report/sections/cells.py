"""Table cells shared by several sections."""

from __future__ import annotations

from ggtool.report.disturbed import mark
from ggtool.report.document import Cell, Column
from ggtool.report.numbers import NONE, bare_mib, digits, with_error
from ggtool.results.records import EvalRecord

FORMAT = Column("format", kind="format")
WEIGHTS = Column(
    "weights MiB", "bytes of the loaded weights: codes, scales, codebooks and what was left alone"
)
PPL = Column("perplexity", "± one standard error")
KLD = Column("KLD", "mean KL divergence from the reference, nats, ± one standard error")
MISSING = Cell(NONE)


def format_cell(record: EvalRecord) -> Cell:
    """Return the cell that names a record's format."""
    return Cell(record.label)


def weights_cell(record: EvalRecord) -> Cell:
    """Return the bytes of the weights."""
    return Cell(bare_mib(record.model_size), record.model_size) if record.model_size else MISSING


def ppl_cell(record: EvalRecord) -> Cell:
    """Return the perplexity with its error."""
    ppl = record.perplexity
    return Cell(with_error(ppl.ppl, ppl.ppl_stderr), ppl.ppl) if ppl else MISSING


def kld_cell(record: EvalRecord) -> Cell:
    """Return the KL divergence with its error."""
    far = record.divergence
    return Cell(with_error(far.kld_mean, far.kld_stderr), far.kld_mean) if far else MISSING


def number_cell(value: float | None, n: int = 3) -> Cell:
    """Return a plain number with n significant digits."""
    return MISSING if value is None else Cell(digits(value, n), value)


def rate_cell(record: EvalRecord, value: float | None) -> Cell:
    """Return tokens a second of a record, marked where something disturbed its timing."""
    return MISSING if value is None else Cell(digits(value) + mark(record), value)


def mib_cell(n_bytes: int | None) -> Cell:
    """Return bytes in MiB."""
    return MISSING if n_bytes is None else Cell(bare_mib(n_bytes), n_bytes)
