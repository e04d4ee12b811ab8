"""Child program of `vendored`: runs llama.cpp's converter on one checkpoint, with a few changes.

    python vendored_program.py SOURCE JOB

SOURCE is llama.cpp's folder, JOB a JSON object: model, out, outtype, pre, remote_code, shapes_only. The changes: code
that comes with a model is not run unless the job allows it; a pre-tokenizer that the converter does not recognize gets
the name `pre`; with `shapes_only` no weights are read and the file has a hole in their place. The last line on stderr,
`@error ...`, gives the reason of a failure. The program ends when its parent does.
"""

import json
import os
import runpy
import sys
import threading
import time
from typing import Any, NoReturn


def main(source: str, job: dict[str, Any]) -> None:
    """Run the converter."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything needed is in the folder
    sys.path[:0] = [source, f"{source}/gguf-py"]
    if not job["remote_code"]:
        from transformers import dynamic_module_utils

        dynamic_module_utils.get_class_in_module = _refuse
    if job["pre"]:
        _name_unknown_pre_tokenizers(job["pre"])
    if job["shapes_only"]:
        _leave_a_hole()
    sys.argv = [
        "convert_hf_to_gguf.py", job["model"], "--outtype", job["outtype"], "--outfile", job["out"]
    ]  # fmt: skip
    runpy.run_path(f"{source}/convert_hf_to_gguf.py", run_name="__main__")


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _refuse(*_arguments: Any, **_options: Any) -> NoReturn:
    raise RuntimeError(
        "this model brings code of its own; look at it, and pass --trust-remote-code to run it"
    )


def _name_unknown_pre_tokenizers(name: str) -> None:
    from conversion.base import TextModel  # type: ignore[import-not-found]  # on the path since main

    known = TextModel.get_vocab_base_pre

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            return name

    TextModel.get_vocab_base_pre = get_vocab_base_pre


def _leave_a_hole() -> None:
    from gguf import GGUFWriter

    def write_tensors_to_file(self: Any, *, progress: bool = False) -> None:  # noqa: ARG001
        self.write_ti_data_to_file()
        (file,) = self.fout
        self.write_padding(file, file.tell())
        sizes = (self.ggml_pad(tensor.nbytes, self.data_alignment) for tensor in self.tensors[0].values())
        file.truncate(file.tell() + sum(sizes))

    GGUFWriter.write_tensors_to_file = write_tensors_to_file


if __name__ == "__main__":
    try:
        main(sys.argv[1], json.loads(sys.argv[2]))
    except Exception as error:  # noqa: BLE001  # whatever it is, it goes to the user as one line
        print(f"\n@error {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
