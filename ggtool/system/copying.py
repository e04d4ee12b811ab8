"""Copy a range of one file into another, in the kernel: without reading it where the file system can share blocks."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from ggtool.errors import OutputError

_PIECE_BYTES = 1 << 26
# What a file system, or a pair of them, answers that cannot copy in the kernel.
_CANNOT = frozenset({errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF})


def copy_range(
    source: int,
    source_offset: int,
    target: int,
    target_offset: int,
    n_bytes: int,
    report: Callable[[int], None] | None = None,
) -> None:
    """Copy `n_bytes` between two open files; report(bytes of this piece) follows each piece.

    On file systems with shared blocks (Btrfs, XFS) a range that is aligned alike in both files costs no room and no
    time. Raises OutputError when the source ends early, OSError for a full disk.
    """
    in_kernel = True
    done = 0
    while done < n_bytes:
        want, begin, end = min(_PIECE_BYTES, n_bytes - done), source_offset + done, target_offset + done
        copied = 0
        if in_kernel:
            try:
                copied = os.copy_file_range(source, target, want, begin, end)
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
                in_kernel = False
                continue
        else:
            data = os.pread(source, min(want, 1 << 20), begin)
            while copied < len(data):
                copied += os.pwrite(target, data[copied:], end + copied)
        if copied == 0:
            raise OutputError("a file became shorter while it was copied; run again.")
        done += copied
        if report:
            report(copied)
