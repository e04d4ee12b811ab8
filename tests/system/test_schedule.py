"""Work spread over nodes, without a cluster: what is placed where, what is tried again, how files get to a node."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from ggtool.cli.ray_flag import with_address
from ggtool.errors import MeasureError, OutputError, UsageError
from ggtool.system.schedule import ray_cluster
from ggtool.system.schedule.local import LocalScheduler
from ggtool.system.schedule.manifest import CHUNK_BYTES, Read, describe, fetch
from ggtool.system.schedule.placement import MOST_LOSSES, MOST_NODES, Waiting, choose, unplaceable
from ggtool.system.schedule.work import Files, Needs, Node, Silent, Site, Work

GIB = 2**30
LARGE = Node("large", "large", cpus=4, gpus=1, memory_bytes=8 * GIB, kind="a")
SMALL = Node("small", "small", cpus=1, memory_bytes=2 * GIB, kind="b")


def work(key: str, after: str = "", files: tuple[Files, ...] = (), **needs) -> Work:
    return Work(key, key, f"{__name__}:double", key, Needs(**needs), files, after)


def double(argument: str, site: Site) -> str:
    site.progress("doubling", 1, 1)
    if argument == "bad":
        raise MeasureError("it is bad")
    return argument * 2


def placed(works: list[Work], nodes: list[Node]) -> dict[str, list[str]]:
    """Place as many works as fit at once; node -> keys."""
    waiting = [Waiting(one) for one in works]
    running: dict[str, list[Work]] = {}
    while (found := choose(waiting, nodes, running, {})) is not None:
        waiting.remove(found[0])
        running.setdefault(found[1].id, []).append(found[0].work)
    return {node: [one.key for one in there] for node, there in running.items()}


def test_works_are_packed_by_cpus_memory_and_parts_of_a_gpu() -> None:
    five = {"large": ["q0", "q1", "q2", "q3"], "small": ["q4"]}
    assert placed([work(f"q{n}") for n in range(9)], [LARGE, SMALL]) == five
    assert placed([work(f"q{n}", cpus=2) for n in range(9)], [LARGE, SMALL]) == {"large": ["q0", "q1"]}
    assert placed([work(f"q{n}", memory_bytes=3 * GIB) for n in range(9)], [LARGE]) == {"large": ["q0", "q1"]}
    assert placed([work(f"q{n}", gpus=0.5) for n in range(9)], [LARGE, SMALL]) == {"large": ["q0", "q1"]}


def test_what_is_alone_shares_a_node_with_nothing() -> None:
    both = [work("speed", alone=True), work("q0"), work("q1")]
    assert placed(both, [SMALL]) == {"small": ["q0"]}  # packed first, since they free their node sooner
    assert placed(both, [LARGE, replace(LARGE, id="other")]) == {"large": ["q0"], "other": ["q1"]}
    assert placed([work("s0", alone=True), work("s1", alone=True)], [LARGE]) == {"large": ["s0"]}
    assert choose([Waiting(work("q"))], [LARGE], {"large": [work("s", alone=True)]}, {}) is None


def test_a_work_stays_on_its_kind_of_node_as_long_as_there_is_one() -> None:
    timed = work("speed", alone=True, kind="b")
    assert placed([timed], [LARGE, SMALL]) == {"small": ["speed"]}
    assert placed([timed], [LARGE]) == {"large": ["speed"]}


def test_a_node_that_has_the_files_is_taken_first() -> None:
    needed = (Files(Path("/model")),)
    other = replace(LARGE, id="other")
    found = choose([Waiting(work("q", files=needed))], [LARGE, other], {}, {"other": set(needed)})
    assert found is not None
    assert found[1] is other


def test_more_memory_than_any_node_has_is_tried_on_the_largest_alone() -> None:
    huge = work("huge", memory_bytes=99 * GIB)
    assert placed([huge, work("q")], [LARGE, SMALL]) == {"large": ["huge"], "small": ["q"]}


def test_a_work_is_tried_on_other_nodes_and_then_given_up() -> None:
    nodes = [replace(LARGE, id=str(n)) for n in range(MOST_NODES + 2)]
    one = Waiting(work("q"))
    for node in nodes[: MOST_NODES - 1]:
        one.fail(node, "no memory")
        assert not one.is_hopeless(nodes)
        assert not one.may_run_on(node, nodes)
    one.fail(nodes[MOST_NODES], "no disk")
    assert one.is_hopeless(nodes)
    assert one.reasons == ["no memory", "no disk"]
    only = Waiting(work("q"))
    only.fail(SMALL, "no memory")
    assert only.is_hopeless([SMALL])
    assert not only.is_hopeless([SMALL, LARGE])


def test_a_work_whose_worker_is_lost_again_and_again_is_given_up() -> None:
    one = Waiting(work("q"))
    for _ in range(MOST_LOSSES):
        one.lose("the node was lost")
        assert not one.is_hopeless([LARGE])
    one.lose("the node was lost")
    assert one.is_hopeless([LARGE])
    assert one.reasons == [f"its worker was lost {MOST_LOSSES + 1} times: the node was lost"]


def test_a_work_whose_files_are_gone_is_tried_nowhere() -> None:
    one = Waiting(work("q"))
    one.give_up("cannot read /model")
    assert one.is_hopeless([LARGE, SMALL])
    assert one.reasons == ["cannot read /model"]


def test_what_no_node_can_hold_is_named() -> None:
    assert "8 threads, and the largest node has 4 CPUs" in unplaceable([work("q", cpus=8)], [LARGE, SMALL])
    assert "needs a GPU" in unplaceable([work("q", gpus=0.5)], [SMALL])
    assert unplaceable([work("q", cpus=4, gpus=1)], [LARGE, SMALL]) == ""


def test_works_run_here_in_order_and_none_after_one_that_failed() -> None:
    works = [work("a"), work("bad"), work("b", after="bad"), work("c", after="b"), work("d", after="a")]
    told = []

    class Told(Silent):
        def running(self, work: Work, node: Node, stage: str, done: int, total: int) -> None:
            told.append((work.key, stage))

    ends = list(LocalScheduler(SMALL).run(works, Told()))
    assert [(end.work.key, end.result, end.failure) for end in ends] == [
        ("a", "aa", ""),
        ("bad", None, "it is bad"),
        ("d", "dd", ""),
    ]
    assert told == [("a", "doubling"), ("bad", "doubling"), ("d", "doubling")]
    assert all(end.started_s <= end.ended_s for end in ends)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GGTOOL_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_bytes(os.urandom(CHUNK_BYTES + 3))
    (model / "config.json").write_text("{}")
    (model / "optimizer").write_text("not asked for")
    return model


def reader(log: list[int]) -> Read:
    def read(path: Path, offset: int, n_bytes: int) -> bytes:
        log.append(n_bytes)
        return path.read_bytes()[offset : offset + n_bytes]

    return read


def ignore(done: int, total: int) -> None:
    pass


def test_a_folder_is_brought_to_a_node_once(folder: Path) -> None:
    manifest = describe(Files(folder, ("weights", "config.json")))
    read: list[int] = []
    copy = fetch(manifest, reader(read), ignore)
    assert copy.name == folder.name
    assert sorted(path.name for path in copy.iterdir()) == ["config.json", "weights"]
    assert (copy / "weights").read_bytes() == (folder / "weights").read_bytes()
    assert read == [CHUNK_BYTES, 3, 2]
    assert fetch(manifest, reader(read), ignore) == copy
    assert len(read) == 3


def test_a_file_that_changes_on_its_way_is_not_kept(folder: Path) -> None:
    manifest = describe(Files(folder / "weights"))
    (folder / "weights").write_bytes(bytes(CHUNK_BYTES + 3))
    with pytest.raises(OutputError, match="was changed while it was copied"):
        fetch(manifest, reader([]), ignore)
    assert not manifest.copy.exists()


def test_a_file_is_made_on_the_node_where_that_gives_the_same_bytes(folder: Path) -> None:
    content = (folder / "weights").read_bytes()
    manifest = describe(Files(folder / "weights"))
    read: list[int] = []
    copy = fetch(manifest, reader(read), ignore, lambda path: path.write_bytes(content) and None)
    assert (read, copy.read_bytes() == content) == ([], True)
    copy.unlink()
    other = fetch(manifest, reader(read), ignore, lambda path: path.write_bytes(b"other") and None)
    assert (len(read), other.read_bytes() == content) == (2, True)


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("--ray", "--ray=local"),
        ("mine.yaml --ray -q", "mine.yaml --ray=local -q"),
        ("--ray mine.yaml", "--ray=local mine.yaml"),
        ("--ray head:6379 mine.yaml", "--ray=head:6379 mine.yaml"),
        ("--ray auto", "--ray=auto"),
        ("--ray=10.0.0.1:6379", "--ray=10.0.0.1:6379"),
        ("-q -- --ray", "-q -- --ray"),
    ],
)
def test_an_address_may_be_left_out(typed: str, read: str) -> None:
    assert with_address(typed.split()) == read.split()


def test_what_cannot_be_connected_to_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def message(address: str) -> str:
        with pytest.raises(UsageError) as caught, ray_cluster.connected(address, print):
            pass
        return str(caught.value)

    assert "there is no Ray cluster at 127.0.0.1:1" in message("127.0.0.1:1")
    assert "Start one with `ray start`" in message("127.0.0.1:1")
    assert "pass its host:port, or auto" in message("ray://head:10001")
    assert "there is no Ray cluster at head" in message("head")
    monkeypatch.setattr(ray_cluster.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(ray_cluster.sys.modules, "ray", raising=False)
    assert "pip install 'ggtool[ray]'" in message("local")
