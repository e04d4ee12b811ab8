"""Plan an evaluation, so that mistakes are found before the first measurement.

Formats are parsed, the model and the reference found, the text tokenized once, and GGUF files converted in
one pass into the cache, which is keyed by the checkpoint's content and the code that made them; those made with
an importance matrix (`gguf-iq2_xs+imatrix`) in a second pass, under names that hold the matrix's sha256. Packed
models that a calibration text decides (`scratch-gptq4`, `scratch-nf4+awq`) are made once, into the cache as well.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ggtool import corpus
from ggtool.backends import Engine, LoadOptions, has_rotary_positions, too_many_positions
from ggtool.backends.device import choose_device
from ggtool.calibration.spread import Spread
from ggtool.corpus import Text, Tokens
from ggtool.errors import MeasureError, UsageError
from ggtool.evaluation.accuracy.harness import ask_tasks
from ggtool.evaluation.accuracy.items import TaskItems
from ggtool.evaluation.accuracy.task_files import parse_tasks
from ggtool.evaluation.jobs import TASKS, ModelToOpen, TokenizeJob
from ggtool.evaluation.metrics.windows import cut
from ggtool.evaluation.model_cache import MadeFile, Making, make_files
from ggtool.evaluation.request import DEFAULT_REFERENCE, NO_REFERENCE, EvalRequest
from ggtool.evaluation.target import Target, format_of, make_target, refuse_other_weights
from ggtool.formats import Format, find_backend
from ggtool.gguf.model import open_artifact
from ggtool.quantizers.format_spec import Spec, check_calibration, parse_backend
from ggtool.quantizers.saved_folder import (
    is_quantized_folder,
    read_facts,
)
from ggtool.quantizers.selectors import ALL, check_blocks
from ggtool.source.resolve import ModelSource, from_folder, resolve
from ggtool.system import worker
from ggtool.system.progress import Notify, StageProgress


@dataclass(frozen=True)
class Plan:
    """The targets in the order asked for, the reference, and the token stream they share.

    source: the checkpoint they were made of, None where only files were named.
    """

    request: EvalRequest
    targets: tuple[Target, ...]
    reference: Target | None
    text: Text
    tokens: Tokens
    device: Literal["cpu", "cuda"]
    source: ModelSource | None = None
    tasks: tuple[TaskItems, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """What is measured of every target, in order."""
        return (*TASKS, *(items.part for items in self.tasks))

    def items_of(self, part: str) -> TaskItems | None:
        """Return the items whose answers a part holds, None for a part of TASKS."""
        return next((items for items in self.tasks if items.part == part), None)

    def to_answer(self, target: Target, items: TaskItems) -> ModelToOpen:
        """Return how a child opens a target to answer a task: with its own context, and llama.cpp without rounding keys and values.

        llama-perplexity's task is answered as llama-perplexity computes.
        """
        engine: Engine = "eager" if self.request.engine == "auto" else self.request.engine
        opened = self.to_open(target, engine)
        exact = items.kind != "llama_hellaswag"
        return replace(opened, options=replace(opened.options, n_ctx=0, exact=exact))

    def to_open(self, target: Target, engine: Engine | None = None) -> ModelToOpen:
        """Return how a child opens a target, by `engine` instead of the request's if that is told."""
        request = self.request
        chosen = engine or request.engine
        options = LoadOptions(
            request.n_ctx,
            request.threads,
            self.device,
            target.components,
            engine=chosen,
            gpus=request.gpus,
        )
        return ModelToOpen(target.format, target.path, options)


def plan(
    request: EvalRequest,
    notify: Notify,
    progress: StageProgress,
    *,
    dry: bool = False,
    spread: Spread | None = None,
) -> Plan:
    """Resolve names, model, text, context and files; a dry plan makes no missing files.

    spread: the nodes that make what is missing and will measure, so that the device need not be one that this machine has.
    Raises UsageError, SourceError, ArtifactError or OutputError.
    """
    request = _with_saved_model(request)
    specs = [parse_backend(name) for name in request.backends]
    if not specs:
        raise UsageError(
            "name at least one --backend, such as bnb-nf4 or gguf-q4_0 (`ggtool formats` lists all), or a model on disk."
        )
    asked = request.reference
    reference = parse_backend(asked) if asked is not None and asked.lower() != NO_REFERENCE else None
    everything = specs if reference is None else [*specs, reference]
    check_calibration(everything, request.calibration)
    needs_source = request.model is not None or any(isinstance(spec.what, Format) for spec in everything)
    source = resolve(request.model, request.revision, notify) if needs_source else None
    if asked is None and source is not None:
        reference = Spec(find_backend(DEFAULT_REFERENCE))
        everything = [*specs, reference]
    if source is not None:
        _check_model(source, everything, request.n_ctx)
    for spec in everything:
        if isinstance(spec.what, Path) and not spec.what.is_dir():
            open_artifact(spec.what)  # so that a damaged file is reported before a text is fetched
    for_torch = spread is None and any(_runs_in_torch(spec) for spec in everything)
    device = choose_device(request.device, for_torch=for_torch)
    text = corpus.load_text(
        request.corpus,
        source.name if source else _name_alone(specs),
        notify,
        column=request.text_column,
        samples=request.samples,
    )
    tokens = corpus.tokenize(text.text, source) if source else _tokenize_alone(specs, text)
    for spec in everything:
        if isinstance(spec.what, Path) and spec.what.is_dir():
            _check_vocabulary(spec.what, source, text, tokens)
    tokens = tokens.first(request.max_tokens)
    cut(request.protocol, len(tokens.ids), request.n_ctx, n_chunks=request.n_chunks, stride=request.stride)
    recipe = Making(request.calibration, request.calibration_chunks, device, request.threads, spread)
    made = {} if source is None else make_files(source, everything, recipe, progress, dry=dry)
    _refuse_failures(specs, reference, made)
    targets = tuple(make_target(spec, source, made) for spec in specs)
    compared = None if reference is None else make_target(reference, source, made)
    refuse_other_weights(targets if compared is None else [compared, *targets])
    task_specs = parse_tasks(request.tasks)
    vocabulary = source.folder if source else _vocabulary_alone(specs)
    return Plan(
        request=request,
        targets=targets,
        reference=compared,
        text=text,
        tokens=tokens,
        device=device,
        source=source,
        tasks=ask_tasks(task_specs, request.limit, vocabulary, progress) if task_specs else (),
    )


def _check_model(source: ModelSource, specs: Sequence[Spec], n_ctx: int) -> None:
    """Refuse blocks that the model does not have, and contexts longer than its learned positions."""
    for spec in specs:
        if spec.components != ALL:
            check_blocks(spec.components, source.weights)
    trained = source.config.get("n_positions")
    if isinstance(trained, int) and n_ctx > trained and not has_rotary_positions(source.config):
        raise too_many_positions(source.name, trained)


def _refuse_failures(specs: Sequence[Spec], reference: Spec | None, made: Mapping[Spec, MadeFile]) -> None:
    """Raise the failure of the reference or of the only formats; other failures become failed rows."""
    failures = {spec: file.failure for spec, file in made.items() if file.failure is not None}
    if reference in failures:
        raise failures[reference]
    if failures and all(spec in failures for spec in specs):
        raise failures[specs[0]]


def _with_saved_model(request: EvalRequest) -> EvalRequest:
    """Take a --model that `ggtool quantize` saved for what it is: the one thing to measure."""
    folder = None if request.model is None else Path(request.model).expanduser()
    if folder is None or not is_quantized_folder(folder):
        return request
    if request.backends:
        raise UsageError(
            f"{request.model} is quantized already; measure it by `ggtool eval {request.model}`, beside others of the "
            "checkpoint that --model names."
        )
    return replace(request, model=None, backends=[str(folder.resolve())])


def _tokenize_alone(specs: Sequence[Spec], text: Text) -> Tokens:
    """Tokenize without a checkpoint: with a saved model's tokenizer, else with the first GGUF file's vocabulary."""
    paths = [spec.what for spec in specs if isinstance(spec.what, Path)]
    folder = next((path for path in paths if path.is_dir()), None)
    return _tokenize_with_gguf(paths[0], text) if folder is None else _tokenize_with_folder(folder, text)


def _name_alone(specs: Sequence[Spec]) -> str | None:
    """Return the short name of the model that the first saved folder was made of, None without one."""
    folders = (spec.what for spec in specs if isinstance(spec.what, Path) and spec.what.is_dir())
    return next((read_facts(folder).model.rpartition("/")[2] for folder in folders), None)


def _vocabulary_alone(specs: Sequence[Spec]) -> Path:
    """Return whose vocabulary is used without a checkpoint: a saved model's, else the first GGUF file's."""
    paths = [spec.what for spec in specs if isinstance(spec.what, Path)]
    return next((path for path in paths if path.is_dir()), paths[0])


def _tokenize_with_folder(folder: Path, text: Text) -> Tokens:
    return corpus.tokenize(text.text, from_folder(folder))


def _tokenize_with_gguf(path: Path, text: Text) -> Tokens:
    """Tokenize with the vocabulary of a GGUF file, in a child: native code reads the file."""
    with tempfile.TemporaryDirectory(prefix="ggtool-eval-") as folder:
        written, ids = Path(folder) / "text.txt", Path(folder) / "tokens.npz"
        written.write_bytes(text.text.encode())
        worker.run(TokenizeJob(format_of(open_artifact(path)), path.resolve(), written, ids))
        return Tokens.load(ids)


def _check_vocabulary(folder: Path, source: ModelSource | None, text: Text, tokens: Tokens) -> None:
    """Refuse a saved model whose own tokenizer would have made other ids of the text."""
    own, theirs = folder / "tokenizer.json", source and source.folder / "tokenizer.json"
    if theirs and own.exists() and theirs.exists() and own.read_bytes() == theirs.read_bytes():
        return
    if _tokenize_with_folder(folder, text).sha256 != tokens.sha256:
        raise MeasureError(
            f"the tokenizer in {folder} gives other token ids than that of the model beside it; numbers on different "
            "tokens cannot be compared. Measure them one by one."
        )


def _runs_in_torch(spec: Spec) -> bool:
    if isinstance(spec.what, Path):
        return spec.what.is_dir()
    return spec.what.runtime == "huggingface"
