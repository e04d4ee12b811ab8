"""The task whose value is two words, `--tasks llama:hellaswag FILE`."""

import pytest

from ggtool.cli.task_flag import with_task_file


@pytest.mark.parametrize(
    ("typed", "taken"),
    [
        ("m.gguf --tasks llama:hellaswag f.txt --limit 4", "m.gguf --tasks llama:hellaswag=f.txt --limit 4"),
        ("--tasks llama:hellaswag=f.txt m.gguf", "--tasks llama:hellaswag=f.txt m.gguf"),
        ("--tasks llama:hellaswag --limit 4", "--tasks llama:hellaswag --limit 4"),
        ("--tasks ggtool-cloze m.gguf", "--tasks ggtool-cloze m.gguf"),
        ("--tasks LLAMA:HellaSwag f.txt", "--tasks llama:hellaswag=f.txt"),
    ],
)
def test_the_file_goes_with_its_task(typed: str, taken: str) -> None:
    assert with_task_file(typed.split()) == taken.split()
