"""The errors ggtool raises on purpose. The command line prints each as one line and exits with its code.

    GgtoolError             exit 1   the request could not be carried out
    ├── UsageError          exit 2   the request itself is wrong: a flag, a format's name
    ├── SourceError         exit 1   a checkpoint cannot be found or used
    ├── ArtifactError       exit 1   a GGUF or packed model on disk cannot be used
    ├── OutputError         exit 1   a result cannot be written where it was asked for
    ├── MeasureError        exit 1   a measurement produced no trustworthy number
    ├── CrashError          exit 1   native code ended the process that ran it
    └── HubError            exit 1   the Hub refused, cannot be reached, or holds different content

A message says what is wrong, where, and what to do next, in one line.
"""


class GgtoolError(Exception):
    """Base of every error that ggtool explains to its user."""

    exit_code = 1


class UsageError(GgtoolError):
    """The request is wrong, before any work was done."""

    exit_code = 2


class SourceError(GgtoolError):
    """A checkpoint cannot be had or cannot be trusted."""


class ArtifactError(GgtoolError):
    """A quantized model on disk is missing, damaged or of the wrong kind."""


class OutputError(GgtoolError):
    """An output cannot be written: it exists, the disk is full, the folder is read-only."""


class MeasureError(GgtoolError):
    """A measurement failed; no number is better than a wrong one."""


class CrashError(GgtoolError):
    """The process that ran a model ended without an answer: native code crashed, or the system killed it."""


class HubError(GgtoolError):
    """The Hub refused, could not be reached, or holds something else than it should."""
