"""`ggtool doctor`: what is installed, what the machine has, what of it is used, and what to do where something is missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from ggtool.cli.flags import Json

if TYPE_CHECKING:
    from ggtool.cli.examine import Finding

_MARKS = {"ok": "", "note": "-", "problem": "!"}


def doctor(json_: Json = False) -> None:
    """Say what is installed and how well it runs on this machine; the exit code is 1 where something does not work.

    Lines with "-" could be better or are optional, those with "!" are problems. No token is ever shown.

    Example: [bold]ggtool doctor --json[/bold]
    """
    from ggtool.cli.examine import examine

    findings = examine()
    print(as_json(findings) if json_ else as_text(findings))
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(1)


def as_json(findings: Sequence[Finding]) -> str:
    """Return {"ok": bool, "sections": {section: {name: value}}, "advice": [{section, name, state, advice}]}."""
    sections: dict[str, dict[str, Any]] = {}
    for finding in findings:
        sections.setdefault(finding.section, {})[finding.name] = finding.value
    advice = [
        {"section": one.section, "name": one.name, "state": one.state, "advice": one.advice}
        for one in findings
        if one.state != "ok"
    ]
    ok = all(finding.state != "problem" for finding in findings)
    return json.dumps({"ok": ok, "sections": sections, "advice": advice}, indent=2, allow_nan=False)


def as_text(findings: Sequence[Finding]) -> str:
    """Return a section a paragraph, a finding a line, what to do on a line of its own below it."""
    width = max(len(finding.name) for finding in findings)
    lines: list[str] = []
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines += [*([""] if lines else []), section]
        shown = f"{_MARKS[finding.state]:1} {_label(finding):{width}}  {_shown(finding)}"
        lines.append(shown.rstrip())
        if finding.advice:
            lines.append(f"  {'':{width}}  -> {finding.advice}")
    notes = sum(finding.state == "note" for finding in findings)
    problems = sum(finding.state == "problem" for finding in findings)
    return "\n".join([*lines, "", f"{problems} problems, {notes} notes"])


def _label(finding: Finding) -> str:
    if finding.section == "environment":
        return finding.name
    return finding.name.removesuffix("_bytes").replace("_", " ")


def _shown(finding: Finding) -> str:
    value = finding.value
    if finding.name.endswith("_bytes") and isinstance(value, int):
        return f"{value / 2**30:.1f} GiB"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, list):
        return " ".join(value) if finding.section in ("cpu", "llama.cpp") else ", ".join(value) or "none"
    return str(value)
