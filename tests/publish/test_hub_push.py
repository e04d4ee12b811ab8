"""`ggtool push` as its users meet it, against a local server that speaks the Hub's protocol."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
from pathlib import Path

import pytest
from writable_hub import READ, WRITE, Fault, WritableHub, writable_hub

REPO = "someone/tiny-GGUF"
PUBLISHED = [
    "README.md",
    "figures/quality.svg",
    "results.jsonl",
    "tiny-gpt2-F16.gguf",
    "tiny-gpt2-Q4_0.gguf",
    "tiny-gpt2-Q8_0.gguf",
]


def remote(server: WritableHub, ref: str = "main") -> dict[str, str]:
    """Path -> sha256 of what the server holds."""
    tree = server.repos[REPO].tree(ref) or {}
    return {path: blob.sha256 for path, blob in tree.items() if path != ".gitattributes"}


def local(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in PUBLISHED}


def test_a_folder_arrives_whole_in_one_commit_and_only_once(folder: Path, run) -> None:
    with writable_hub() as server:
        done = run(server, "push", folder, REPO)
        assert done.returncode == 0, done.stderr
        assert "6 files sent" in done.stdout
        assert "all hashes compared" in done.stdout
        assert remote(server) == local(folder)
        commits, uploads = len(server.repos[REPO].commits), server.uploads.copy()
        assert commits == 2  # the one that made the repo, and ours
        again = run(server, "push", folder, REPO)
        assert again.returncode == 0, again.stderr
        assert "0 files sent" in again.stdout
        assert "6 were there" in again.stdout
        assert (len(server.repos[REPO].commits), server.uploads) == (commits, uploads)


def test_only_what_changed_is_sent(folder: Path, run) -> None:
    with writable_hub() as server:
        run(server, "push", folder, REPO)
        uploads = server.uploads.copy()
        (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# tiny, again\n")
        done = run(server, "push", folder, REPO, "--json")
        assert [file["path"] for file in json.loads(done.stdout)["sent"]] == ["README.md"]
        assert server.uploads == uploads
        assert remote(server) == local(folder)


def test_killed_in_the_middle_it_goes_on_and_sends_no_finished_file_again(folder: Path, start, run) -> None:
    sizes = {name: (folder / name).stat().st_size for name in PUBLISHED if name.endswith(".gguf")}
    part_bytes = 1 << 18
    first = -(-sizes["tiny-gpt2-F16.gguf"] // part_bytes)
    assert first > 3, "the file must be sent in parts for this test to say anything"
    with writable_hub(part_bytes=part_bytes) as server:
        server.n_uploads_before_hold = first + 1  # the first file whole, and one part of the second
        child = start(server, "push", folder, REPO)
        assert server.held.wait(60)
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        assert remote(server) == {}
        server.n_uploads_before_hold = -1
        server.released.set()
        hashes = local(folder)
        finished = hashes["tiny-gpt2-F16.gguf"]
        assert finished in server.lfs
        done = run(server, "push", folder, REPO)
        assert done.returncode == 0, done.stderr
        assert remote(server) == hashes
        assert {n for (sha256, _), n in server.uploads.items() if sha256 == finished} == {1}
        assert len([key for key in server.uploads if key[0] == finished]) == first
        assert len(server.repos[REPO].commits) == 2


def test_ctrl_c_is_one_line(folder: Path, start) -> None:
    with writable_hub() as server:
        server.n_uploads_before_hold = 0
        child = start(server, "push", folder, REPO, "--quiet")
        assert server.held.wait(60)
        child.send_signal(signal.SIGINT)
        server.released.set()
        _, err = child.communicate(timeout=60)
    assert child.returncode == 1
    assert err == "ggtool: stopped; run the same command again: what is finished is kept.\n"


ALWAYS = math.inf


@pytest.mark.parametrize(
    ("token", "faults", "says"),
    [
        (None, [], "there is no Hub token; set HF_TOKEN or run `hf auth login`"),
        ("hf_" + "x" * 34, [], "the Hub does not accept the token"),
        (READ, [], "the token of someone may only read"),
        (WRITE, [Fault("POST .*/commit/", ALWAYS, 403)], "the token has no right to do this"),
        (WRITE, [Fault("PUT /lfs", ALWAYS, 429)], "refuses more requests for now (429, rate limit)"),
        (WRITE, [Fault("", ALWAYS, 429)], "refuses more requests for now (429, rate limit)"),
        (WRITE, [Fault("objects/batch", ALWAYS, 503)], "the Hub failed (503)"),
        (WRITE, [Fault("PUT /lfs", ALWAYS)], "broke ("),
        (WRITE, [Fault("", ALWAYS)], "broke ("),
        (WRITE, [Fault("POST .*/commit/", ALWAYS, 412)], "was changed by someone else meanwhile"),
    ],
)
def test_each_failure_is_one_line(
    token: str | None, faults: list[Fault], says: str, folder: Path, run
) -> None:
    with writable_hub() as server:
        server.faults = faults
        done = run(server, "push", folder, REPO, "--quiet", token=token)
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.startswith("ggtool: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert token is None or token not in done.stderr


def test_a_namespace_of_others_is_refused(folder: Path, run) -> None:
    with writable_hub() as server:
        done = run(server, "push", folder, "others/tiny", "--quiet")
    assert done.returncode == 1
    assert "no right to do this with others/tiny (You don't have the rights to write here)" in done.stderr


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT /lfs", 2),
        Fault("PUT /lfs", 2, 500),
        Fault("PUT /lfs", 1, 429, {"RateLimit": '"api";r=0;t=1'}),
        Fault("GET .*/whoami", 1),
        Fault("POST .*/commit/", 1, 503),
    ],
)
def test_what_passes_is_survived(fault: Fault, folder: Path, run) -> None:
    with writable_hub() as server:
        server.faults = [fault]
        done = run(server, "push", folder, REPO)
        assert done.returncode == 0, done.stderr
        assert fault.times == 0, "the fault was never met"
        assert remote(server) == local(folder)
        assert set(server.uploads.values()) == {1}


def test_a_commit_whose_answer_is_lost_is_not_made_twice(folder: Path, run) -> None:
    with writable_hub() as server:
        server.loses_commit_reply = True
        done = run(server, "push", folder, REPO)
        assert done.returncode == 0, done.stderr
        assert remote(server) == local(folder)
        assert len(server.repos[REPO].commits) == 2


def test_what_the_hub_holds_is_compared_after_the_upload(folder: Path, run) -> None:
    with writable_hub() as server:
        server.corrupts = True
        done = run(server, "push", folder, REPO, "--quiet")
    assert done.returncode == 1
    assert "does not hold what was sent: tiny-gpt2-Q8_0.gguf differ at commit" in done.stderr


def test_a_pull_request_leaves_main_alone(folder: Path, run) -> None:
    with writable_hub() as server:
        done = run(server, "push", folder, REPO, "--create-pr")
        assert done.returncode == 0, done.stderr
        assert "/discussions/1 " in done.stdout
        assert remote(server) == {}
        assert remote(server, "refs/pr/1") == local(folder)


def test_a_lost_answer_opens_no_second_pull_request(folder: Path, run) -> None:
    with writable_hub() as server:
        server.loses_commit_reply = True
        done = run(server, "push", folder, REPO, "--create-pr", "--quiet")
        assert done.returncode == 1
        assert "Look first whether the pull request was opened" in done.stderr
        assert set(server.repos[REPO].refs) == {"main", "refs/pr/1"}


def test_a_dry_run_lists_and_sends_nothing(folder: Path, run) -> None:
    with writable_hub() as server:
        first = run(server, "push", folder, REPO, "--dry-run", token=None)
        assert first.returncode == 0, first.stderr
        assert "would be made" in first.stdout
        assert [name for name in PUBLISHED if name in first.stdout] == PUBLISHED
        assert ".env" not in first.stdout
        assert "notes.txt" not in first.stdout
        assert "talks.jsonl" not in first.stdout
        assert "tiny-gpt2.gguf" not in first.stdout
        assert server.repos == {}
        run(server, "push", folder, REPO)
        (folder / "README.md").write_text("# other\n")
        server.requests.clear()
        plan = json.loads(run(server, "push", folder, REPO, "--dry-run", "--json").stdout)
        assert [file["path"] for file in plan["to_send"]] == ["README.md"]
        assert {file["path"]: file["sha256"] for file in plan["kept"]} == {
            name: sha256 for name, sha256 in local(folder).items() if name != "README.md"
        }
        assert not [one for one in server.requests if one.startswith(("POST", "PUT"))]


def test_private_makes_a_private_repo_and_never_mistakes_a_public_one(folder: Path, run) -> None:
    with writable_hub() as server:
        assert run(server, "push", folder, REPO, "--private").returncode == 0
        assert server.repos[REPO].private
        server.repos[REPO].private = False
        done = run(server, "push", folder, REPO, "--private", "--quiet")
        assert done.returncode == 1
        assert "exists and everyone can read it" in done.stderr


def test_a_card_of_other_files_is_not_published(folder: Path, run) -> None:
    (folder / "README.md").write_text(f"# t\n\n```\n{'0' * 64}  tiny-gpt2-Q4_0.gguf\n```\n")
    with writable_hub() as server:
        done = run(server, "push", folder, REPO, "--quiet")
        assert server.requests == []
    assert done.returncode == 1
    assert "describes another version of tiny-gpt2-Q4_0.gguf; write it again with `ggtool card" in done.stderr


def test_a_damaged_file_is_not_published(folder: Path, run) -> None:
    data = (folder / "tiny-gpt2-Q4_0.gguf").read_bytes()
    (folder / "tiny-gpt2-Q4_0.gguf").write_bytes(data[: len(data) // 2])
    with writable_hub() as server:
        done = run(server, "push", folder, REPO, "--quiet")
        assert server.requests == []
    assert done.returncode == 1
    assert "tiny-gpt2-Q4_0.gguf" in done.stderr


@pytest.mark.parametrize(
    ("repo", "says"), [("a", "OWNER/NAME"), ("a/b/c", "OWNER/NAME"), ("a/../b", "OWNER/NAME")]
)
def test_a_name_that_is_no_repo_is_a_wrong_request(repo: str, says: str, folder: Path, run) -> None:
    with writable_hub() as server:
        done = run(server, "push", folder, repo)
    assert done.returncode == 2
    assert says in done.stderr


def test_a_server_that_repeats_the_token_does_not_get_it_printed(folder: Path, run) -> None:
    with writable_hub() as server:
        server.faults = [Fault("GET .*/whoami", ALWAYS, 403, {"X-Error-Message": f"bad {WRITE}"})]
        done = run(server, "push", folder, REPO)
    assert "bad [token]" in done.stderr
    assert WRITE not in done.stderr + done.stdout


def test_through_xet_a_killed_push_sends_no_finished_file_again(folder: Path, start, run) -> None:
    with writable_hub() as server:
        server.n_uploads_before_hold = 1
        child = start(server, "push", folder, REPO, xet=True)
        assert server.held.wait(60)
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        assert remote(server) == {}
        server.n_uploads_before_hold = -1
        server.released.set()
        assert len(server.uploads) == 1
        done = run(server, "push", folder, REPO, xet=True)
        assert done.returncode == 0, done.stderr
        assert remote(server) == local(folder)
        assert len(server.uploads) == 3
        assert set(server.uploads.values()) == {1}
