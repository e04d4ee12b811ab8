"""The child with lm-eval in it: `ask` writes a task's items to files, `judge` makes metrics of answers.

`ggtool.evaluation.accuracy.harness` is the other end.
"""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggtool.errors import GgtoolError
from ggtool.evaluation.accuracy.encoding import Encoder
from ggtool.evaluation.accuracy.items import TaskItems
from ggtool.evaluation.accuracy.llama_hellaswag import read_items
from ggtool.evaluation.accuracy.task_files import TaskSpec
from ggtool.system.child import Parent, as_event

if TYPE_CHECKING:
    from ggtool.backends.text_backend import Vocabulary
    from ggtool.evaluation.accuracy.lm_tasks import LmTasks


def main() -> None:
    """Answer requests until the parent closes stdin."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    parent, stack = Parent(), ExitStack()
    loaded: LmTasks | None = None
    while True:
        request = parent.receive()
        try:
            specs = [
                TaskSpec(one["name"], one["source"], one["path"] and Path(one["path"]))
                for one in request["tasks"]
            ]
            if loaded is None and any(spec.source != "llama" for spec in specs):
                loaded = _load([spec for spec in specs if spec.source != "llama"])
            if request["do"] == "ask":
                _ask(parent, loaded, specs, request, _vocabulary(Path(request["vocabulary"]), stack))
            else:
                assert loaded is not None
                parent.send(measures=loaded.judge(request["task"], request["limit"], request["answers"]))
        except GgtoolError as error:
            parent.send(**as_event(error))


def _load(specs: list[TaskSpec]) -> LmTasks:
    from ggtool.evaluation.accuracy.lm_tasks import LmTasks

    return LmTasks(specs)


def _ask(
    parent: Parent,
    tasks: LmTasks | None,
    specs: list[TaskSpec],
    request: dict[str, Any],
    vocabulary: Vocabulary,
) -> None:
    own = [spec for spec in specs if spec.source == "llama"]
    names = [] if tasks is None else list(tasks.tasks)
    done, total = 0, len(names) + len(own)

    def send(items: TaskItems) -> None:
        nonlocal done
        done += 1
        path = Path(request["folder"]) / f"{done}.npz"
        items.save(path)
        parent.send(path=str(path), done=done, total=total)

    for name in names:
        assert tasks is not None
        send(tasks.ask(name, request["limit"], Encoder(vocabulary)))
    for spec in own:
        assert spec.path is not None
        send(read_items(spec.path, request["limit"], vocabulary))
    parent.send(asked=total)


def _vocabulary(path: Path, stack: ExitStack) -> Vocabulary:
    if path.is_dir():
        from ggtool.backends.huggingface.vocab import FolderVocabulary

        return FolderVocabulary(path)
    from ggtool.backends.llama_cpp.vocab import open_vocabulary

    return stack.enter_context(open_vocabulary(path))


if __name__ == "__main__":
    main()
