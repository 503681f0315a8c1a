"""``tidemeter doctor``: unsafe settings, each with its fix, before they cost money."""

from __future__ import annotations

import json

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from services.cli.common import ATTENTION, PIPE_WIDTH, UNAVAILABLE, JsonFlag, sentences
from services.doctor.findings import Finding, Report, Severity
from services.wire.settings import load_settings

_STYLES = {
    Severity.ERROR: "bold red",
    Severity.UNCHECKED: "bold magenta",
    Severity.WARNING: "bold yellow",
    Severity.NOTE: "bold",
}


def exit_status(found: Report) -> int:
    """1 when something is unsafe, 3 when nothing is but something could not be checked, else 0."""
    if found.count(Severity.ERROR):
        return ATTENTION
    return UNAVAILABLE if found.count(Severity.UNCHECKED) else 0


def doctor(as_json: JsonFlag = False) -> None:
    """Look for unsafe settings of Kafka, PostgreSQL, Stripe and our own. It changes nothing.

    Exit status 1: something is unsafe. 3: nothing is, as far as it could be checked, and something could not.
    docs/operations/doctor.md explains each code.

    Example: tidemeter doctor --json
    """
    from services.doctor.examine import examine

    with sentences():
        found = examine(load_settings())
    if as_json:
        typer.echo(json.dumps(document(found), indent=2))
    else:
        _print(found)
    raise typer.Exit(exit_status(found))


def document(found: Report) -> dict[str, object]:
    """The JSON document."""
    return {
        "healthy": exit_status(found) == 0,
        "counts": {severity.value: found.count(severity) for severity in Severity} | {"ok": len(found.ok)},
        "findings": [_fields(finding) for finding in found.findings],
        "ok": list(found.ok),
        "not_checked": list(found.not_checked),
    }


def _fields(finding: Finding) -> dict[str, str]:
    return {
        "code": finding.code,
        "severity": finding.severity.value,
        "subject": finding.subject,
        "what": finding.what,
        "fix": finding.fix,
    }


def _print(found: Report) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    for finding in found.findings:
        style = _STYLES[finding.severity]
        console.print(
            Text.assemble((f"{finding.severity.value:10}", style), f"{finding.code} ({finding.subject})")
        )
        console.print(Padding(Text(finding.what), (0, 0, 0, 10), expand=False))
        console.print(Padding(Text(f"Fix: {finding.fix}"), (0, 0, 0, 10), expand=False))
    counts = ", ".join(f"{found.count(severity)} {severity.value}" for severity in Severity)
    console.print(f"{len(found.ok)} ok, {counts}")
    if found.not_checked:
        console.print(f"not checked: {', '.join(found.not_checked)}")
