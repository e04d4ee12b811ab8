"""`ggtool edit`: change a GGUF file's keys and leave its weights alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ggtool.cli.flags import Force, Json, Quiet

if TYPE_CHECKING:
    from ggtool.gguf.edit import Changes
    from ggtool.gguf.header import GGUFHeader

_TOKENIZER = "tokenizer."


def _text(flag: str, help_: str) -> Any:
    return typer.Option(flag, help=help_, show_default=False)


def edit(
    path: Annotated[Path, typer.Argument(help="A .gguf file.", show_default=False)],
    set_: Annotated[
        list[str] | None,
        _text(
            "--set", "KEY=VALUE; a new key as KEY=int:5, float:, bool: or str:, a list as JSON. Repeatable."
        ),
    ] = None,
    delete: Annotated[
        list[str] | None, _text("--delete", "KEY, or 'prefix.*' for all that begin so. Repeatable.")
    ] = None,
    rename: Annotated[list[str] | None, _text("--rename", "OLD=NEW. Repeatable.")] = None,
    template: Annotated[
        Path | None, _text("--template", "Take the chat template from this Jinja file.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        _text(
            "--tokenizer", "Take all tokenizer keys from this checkpoint's folder, or from this .gguf file."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Leave the file as it is and write this one.", show_default=False),
    ] = None,
    force: Force = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Set, delete and rename keys of a GGUF file, or replace its chat template or tokenizer. No weight is read.

    In place where the header fits into the room it has, in a copy that takes the file's name otherwise.

    Examples:
    [bold]ggtool edit model.gguf --set general.name='My model' --delete 'general.base_model.*'[/bold]

    [bold]ggtool edit model.gguf --template chat_template.jinja --out fixed.gguf[/bold]
    """
    from ggtool.cli.console import progress_bar, stdout
    from ggtool.gguf.edit import edit as edit_file

    changes = _changes(path, set_ or (), delete or (), rename or (), template, tokenizer)
    with progress_bar(quiet=quiet) as update:
        made = edit_file(path, changes, out, force=force, progress=update)
    if json_:
        facts = {"path": str(out or path), "in_place": made.in_place, "n_bytes_written": made.n_bytes}
        print(json.dumps({**facts, "changed": list(made.changed)}, indent=2))
        return
    how = "in place" if made.in_place else "copied"
    keys = f"{len(made.changed)} keys changed, {how}" if made.changed else "nothing to change"
    stdout().print(f"{out or path}  {keys}, {made.n_bytes:,} bytes written", markup=False)


def _changes(
    path: Path,
    set_: Sequence[str],
    delete: Sequence[str],
    rename: Sequence[str],
    template: Path | None,
    tokenizer: str | None,
) -> Changes:
    from gguf.constants import GGUFValueType, Keys
    from gguf.gguf_writer import GGUFValue

    from ggtool.conversion.metadata_overrides import split_pair
    from ggtool.errors import UsageError
    from ggtool.gguf.edit import Changes, recover
    from ggtool.gguf.reader import read_header
    from ggtool.gguf.writer import pack

    if not (set_ or delete or rename or template or tokenizer):
        raise UsageError("nothing to change; pass --set, --delete, --rename, --template or --tokenizer.")
    recover(path)
    header = read_header(path)
    deleted = list(delete)
    pairs: dict[str, bytes] = {}
    if tokenizer is not None:
        pairs.update(_tokenizer_pairs(header, tokenizer))
        deleted += [key for key in header.metadata if key.startswith(_TOKENIZER) and key not in pairs]
    if template is not None:
        pairs.update(
            pack({Keys.Tokenizer.CHAT_TEMPLATE: GGUFValue(_template(template), GGUFValueType.STRING)})
        )
    for text in set_:
        key, value = split_pair(text, "--set")
        pairs.update(pack({key: _value(header, key, value)}))
    return Changes(deleted, dict(split_pair(text, "--rename") for text in rename), pairs)


def _value(header: GGUFHeader, key: str, text: str) -> Any:
    from gguf.constants import GGUFValueType
    from gguf.gguf_writer import GGUFValue

    from ggtool.gguf.header import ArrayRef
    from ggtool.gguf.values import parse_like, parse_new

    where = f"--set {key}"
    if key not in header.metadata:
        return parse_new(text, where)
    old = header.metadata[key]
    if isinstance(old, ArrayRef):
        return parse_like(GGUFValue([], GGUFValueType.ARRAY, GGUFValueType(old.type)), text, where)
    return parse_like(GGUFValue(old, GGUFValueType(header.types[key])), text, where)


def _template(path: Path) -> str:
    from ggtool.errors import UsageError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"--template {path} cannot be read: {error}.") from None


def _tokenizer_pairs(header: GGUFHeader, name: str) -> dict[str, bytes]:
    """Return the tokenizer's keys of a checkpoint or of a GGUF file; they must have a token for each row of `header`."""
    from gguf.constants import Keys

    from ggtool.conversion.vocabulary_keys import read_vocabulary_keys
    from ggtool.errors import UsageError
    from ggtool.gguf.header import ArrayRef
    from ggtool.gguf.reader import read_header
    from ggtool.gguf.rewrite import raw_pairs
    from ggtool.gguf.writer import pack

    n_vocab = next((tensor.shape[0] for tensor in header.tensors if tensor.name == "token_embd.weight"), 0)
    source = Path(name).expanduser()
    if source.is_dir():
        return pack(read_vocabulary_keys(source, n_vocab, header.architecture))
    if not source.is_file():
        raise UsageError(f"--tokenizer {name} is neither a checkpoint's folder nor a .gguf file.")
    other = read_header(source)
    tokens = other.metadata.get(Keys.Tokenizer.LIST)
    n_tokens = tokens.length if isinstance(tokens, ArrayRef) else 0
    if n_tokens != n_vocab:
        raise UsageError(f"--tokenizer {name} has {n_tokens:,} tokens, and the model embeds {n_vocab:,}.")
    return {key: pair for key, pair in raw_pairs(other).items() if key.startswith(_TOKENIZER)}
