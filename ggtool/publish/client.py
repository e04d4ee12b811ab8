"""The Hub client: token, repo contents, and every failure as one line that never contains the token."""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from ggtool.errors import GgtoolError, HubError, UsageError
from ggtool.system.progress import Notify

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# More than any model repo has; bounds the time that a hostile listing can take.
_MAX_FILES = 10_000
# Pauses before a broken-off action is retried; the client's own requests retry in addition.
_WAITS_S = (1.0, 4.0)
_AGAIN = "run the same command again: what is finished is kept"


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repo: sha256 is empty where the Hub keeps it in Git, and blob_id is then the blob's SHA-1."""

    path: str
    n_bytes: int
    sha256: str
    blob_id: str


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repo and its files by path."""

    commit: str
    private: bool
    files: Mapping[str, RemoteFile]


class BrokenOffError(HubError):
    """A failure that may succeed when retried: a broken connection, a server error."""


def check_repo_id(repo_id: str) -> str:
    """Return `repo_id` if it is OWNER/NAME; UsageError otherwise."""
    if not _REPO_ID.fullmatch(repo_id):
        raise UsageError(f"{repo_id!r} is not a Hub repo id; write it as OWNER/NAME.")
    return repo_id


def open_api(notify: Notify, *, shows_bars: bool = False) -> HfApi:
    """Return a client of $HF_ENDPOINT with the user's token, if there is one; its waits are said through `notify`."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # public, and not exported
    from huggingface_hub.utils import logging as hub_logging

    if not shows_bars:
        disable_progress_bars()
    hub_logging.disable_propagation()
    logger = hub_logging.get_logger()
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.addHandler(_Waits(notify))
    return HfApi(library_name="ggtool")


def token_of(api: HfApi) -> str | None:
    """Return the token that requests carry: $HF_TOKEN or what `hf auth login` stored; None if there is none."""
    from huggingface_hub import get_token

    return api.token if isinstance(api.token, str) else get_token()


def check_may_write(api: HfApi) -> None:
    """Check the token with the Hub. HubError if it is missing, unknown, or read-only."""
    if token_of(api) is None:
        raise HubError(
            "there is no Hub token; set HF_TOKEN or run `hf auth login`, with a token that may write "
            f"({api.endpoint}/settings/tokens)."
        )
    account = api.whoami()
    token = account.get("auth", {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise HubError(
            f"the token of {account.get('name')} may only read; make one that may write at "
            f"{api.endpoint}/settings/tokens."
        )


def snapshot(api: HfApi, repo_id: str, revision: str | None = None) -> Snapshot | None:
    """Return what the Hub has of `repo_id` at `revision`, or None if it has no such repo that the token may see."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        info = api.repo_info(repo_id, revision=revision)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError as error:
        # The Hub answers 401 both for an unknown token and for a repo that the token may not see.
        if error.response.status_code == 401 and token_of(api) is not None:
            api.whoami()
        return None
    files: dict[str, RemoteFile] = {}
    for entry in api.list_repo_tree(repo_id, recursive=True, revision=info.sha):
        if not isinstance(entry, RepoFile):
            continue
        if len(files) >= _MAX_FILES:
            raise HubError(
                f"{repo_id} lists more than {_MAX_FILES} files, more than any model repo; check the name."
            )
        sha256 = entry.lfs.sha256 if entry.lfs is not None else ""
        files[entry.path] = RemoteFile(entry.path, entry.size, sha256, entry.blob_id)
    return Snapshot(info.sha or "", bool(info.private), files)


def check_path(repo_id: str, path: str) -> None:
    """Refuse a repo path that would leave the target folder, or that contains terminal control characters."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or not path.isprintable():
        raise HubError(
            f"{repo_id} lists a file at {path!r}, which is not a safe path inside the folder, so nothing was downloaded."
        )


def persistently(action: Callable[[], T], api: HfApi, repo_id: str, notify: Notify) -> T:
    """Return what `action` returns, retrying after a pause if it breaks off; HubError says what went wrong."""
    for wait_s in _WAITS_S:
        try:
            with explained(api, repo_id):
                return action()
        except BrokenOffError as error:  # noqa: PERF203  # two rounds of network at most
            notify(f"{error} Trying again in {wait_s:g} s.")
            time.sleep(wait_s)
    with explained(api, repo_id):
        return action()


@contextmanager
def explained(api: HfApi, repo_id: str) -> Iterator[None]:
    """Turn any error of the client into HubError, or into BrokenOffError where a retry may help."""
    try:
        yield
    except GgtoolError:
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:  # no failure of the Hub's
            raise
        raise _found(error, api, repo_id) from None
    except Exception as error:  # noqa: BLE001  # httpx's, httpx2's and Xet's own errors come through, by the client's version
        raise _found(error, api, repo_id) from None


def _found(error: Exception, api: HfApi, repo_id: str) -> HubError:
    message, passes = _explain(error, repo_id, api.endpoint)
    token = token_of(api)
    return (BrokenOffError if passes else HubError)(message.replace(token, "[token]") if token else message)


def _explain(error: BaseException, repo_id: str, endpoint: str) -> tuple[str, bool]:
    """Return the line for an error, and whether the same request may succeed a little later."""
    from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

    chain = list(_causes(error))
    for one in chain:
        if isinstance(one, RevisionNotFoundError):
            return f"{repo_id} has no such revision.", False
        if isinstance(one, HFValidationError):
            return f"{repo_id} is no repo of the Hub: {_first_line(one)}", False
        response = getattr(one, "response", None)
        if response is not None and isinstance(getattr(response, "status_code", None), int):
            said = getattr(one, "server_message", None) or response.headers.get("X-Error-Message") or ""
            return _by_status(response.status_code, repo_id, endpoint, " ".join(str(said).split())[:200])
    for one in chain:
        if isinstance(one, ConnectionError) or any(
            kind.__name__ == "TransportError" for kind in type(one).__mro__
        ):
            return f"the connection to {endpoint} broke ({_first_line(one)}); {_AGAIN}.", True
    return f"{repo_id}: {_first_line(error)}; {_AGAIN}.", False


def _by_status(status: int, repo_id: str, endpoint: str, said: str) -> tuple[str, bool]:
    reason = f" ({said})" if said else ""
    if status == 401:
        return (
            f"the Hub does not accept the token{reason}; make a new one at {endpoint}/settings/tokens.",
            False,
        )
    if status == 403:
        return f"the token has no right to do this with {repo_id}{reason}; check its permissions.", False
    if status == 404:
        return f"the Hub has no {repo_id} that this token may use.", False
    if status in (409, 412):
        return f"{repo_id} was changed by someone else meanwhile{reason}; {_AGAIN}.", False
    if status == 429:
        return (
            f"the Hub refuses more requests for now (429, rate limit); wait some minutes, then {_AGAIN}.",
            False,
        )
    if status >= 500:
        return f"the Hub failed ({status}){reason}; {_AGAIN}.", True
    return f"the Hub refused {repo_id} ({status}){reason}.", False


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")


class _Waits(logging.Handler):
    """Passes on that the client waits, and how long; its other warnings name URLs and are about retries."""

    def __init__(self, notify: Notify) -> None:
        super().__init__(logging.WARNING)
        self._notify = notify

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith(("Rate limited", "Retrying in")):
            self._notify(f"The Hub: {message}")
