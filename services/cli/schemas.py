"""``tidemeter schemas``: what is released, what a change would be, and the beginning of a new version.

Nothing here needs a server. Exit status 1 means that a person has something to do; 2 is a refusal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.common import ATTENTION, MISUSED, JsonFlag, fail, sentences, show_table
from services.wire import topics
from services.wire.errors import Misconfigured

if TYPE_CHECKING:
    from schemas.catalog import Schema
    from schemas.evolution import Difference

schemas_app = typer.Typer(help="See, compare, check and begin schema versions.", no_args_is_help=True)

#: By subject: its topics by version, or the one of all versions; and who writes the current version.
PLACES: dict[str, tuple[dict[int, str] | str, str]] = {
    "usage_event": (topics.USAGE_TOPICS, "ingest, producer, send"),
    "usage_delta": (topics.DELTAS, "counters"),
    "conflict": (topics.CONFLICTS, "counters"),
    "adjustment": (topics.ADJUSTMENTS, "counters"),
    "ops_event": (topics.OPS, "counters, pusher"),
    "stripe_webhook": (topics.STRIPE_WEBHOOKS, "nobody yet"),
}

CELL_CHARS_MAX = 90

_VERDICTS = {
    "compatible": "compatible: may stay on {topic} as a revision of {against}, under a new fingerprint",
    "new_version": "incompatible: needs a new version{new_topic} and an upcaster",
    "refused": "refused: no version may hold this",
}

Subject = Annotated[str, typer.Argument(help="Such as usage_event.")]


@schemas_app.command("list")
def list_schemas(as_json: JsonFlag = False) -> None:
    """List every released schema, and prove that catalogue and upcasters hold together.

    Exit status: 0, or 1 when a released file was edited, a version is unfinished or a step of the chain is
    missing or fails; the sentence on stderr says which.

    Example: tidemeter schemas list --json
    """
    from schemas.catalog import current, writers

    with _catalog_sentences(ATTENTION):
        problem, checked = _proof()
        rows = [
            {
                "subject": one.subject,
                "version": one.label.partition("/")[2],
                "topic": _topic(one.subject, one.version),
                "fingerprint": one.fingerprint.hex(),
                "current": one is current(one.subject),
                "written_by": _writer(one),
                "upcasts": _path(one),
            }
            for one in writers()
        ]
    if as_json:
        document = {"schemas": rows, "holds": problem is None, "problem": problem, "corpus_records": checked}
        typer.echo(json.dumps(document, ensure_ascii=False))
    else:
        show_table(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows])
        if problem is None:
            typer.echo(f"catalogue and upcasters hold; {checked} corpus records come through")
    if problem is not None:
        raise fail(problem, ATTENTION)


@schemas_app.command()
def check(
    file: Annotated[Path, typer.Argument(help="The proposed schema, an .avsc file.")],
    subject: Annotated[str, typer.Option(help="Subject it is meant for, such as usage_event.")],
    against: Annotated[
        int | None, typer.Option(help="Version to compare with; default the current one.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Say whether a proposed schema may stay on its topic, needs a new version, or is refused.

    It may stay, as a revision such as v3.1.avsc, if this release can read what older ones wrote (new reads
    old) and a reader into the older schema can read what this one writes (old reads new), both by Avro's
    schema resolution and without a change to the type of a field they share. Readers find a writer's schema
    by its fingerprint, so they are released before writers in either case.

    Exit status: 0 compatible, 1 needs a new version, 2 refused or misused.

    Example: tidemeter schemas check proposed.avsc --subject usage_event
    """
    from schemas.proposal import judge

    with _catalog_sentences():
        version = _version_of(subject, against)
        try:
            found = judge(file, subject, version)
        except OSError as error:
            raise Misconfigured(f"cannot read {file}: {error.strerror}") from None
    topic = _topic(subject, version)
    verdict = _VERDICTS[found.verdict].format(
        topic=topic,
        against=found.against.label,
        new_topic=", a new topic" if isinstance(PLACES[subject][0], dict) else "",
    )
    if as_json:
        document = {
            "subject": subject,
            "against": found.against.label,
            "topic": topic,
            "verdict": found.verdict,
            "new_reads_old": not found.refusals and all(one.new_reads_old for one in found.differences),
            "old_reads_new": not found.refusals and all(one.old_reads_new for one in found.differences),
            "differences": [asdict(one) for one in found.differences],
            "refusals": [asdict(one) for one in found.refusals],
        }
        typer.echo(json.dumps(document, ensure_ascii=False))
    else:
        _show_differences(found.differences)
        for refusal in found.refusals:
            typer.echo(f"{refusal.code}  {refusal.path}: {refusal.why}")
        typer.echo(f"against {found.against.label}: {verdict}")
    if found.verdict != "compatible":
        raise typer.Exit(MISUSED if found.refusals else ATTENTION)


@schemas_app.command()
def diff(
    subject: Subject,
    old: Annotated[str, typer.Argument(help="A version (2), a revision (3.0) or a file.")],
    new: Annotated[str, typer.Argument(help="A version (3), a revision (3.1) or a file.")],
    as_json: JsonFlag = False,
) -> None:
    """Show field by field how two schemas differ, and who could read whom by Avro's resolution alone.

    Exit status: 0, or 2 when one of them does not exist or is no schema of ours.

    Example: tidemeter schemas diff usage_event 2 3
    """
    from schemas.evolution import differences

    with _catalog_sentences():
        _version_of(subject, None)
        found = differences(_document(subject, old), _document(subject, new))
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], ensure_ascii=False))
    elif found:
        _show_differences(found)
    else:
        typer.echo("no difference")


@schemas_app.command("new-version")
def new_version(
    subject: Subject,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be written.")] = False,
) -> None:
    """Begin the version after the current one: its schema, an upcaster that raises, a test, and what is left.

    Nothing starts with these files until every step is done: the catalogue refuses a version above the
    current one, and the chain fails on the upcaster. It needs a source checkout, and writes over nothing.

    Example: tidemeter schemas new-version usage_event --dry-run
    """
    from schemas.catalog import ROOT, current
    from schemas.scaffold import new_files, remaining_steps

    with _catalog_sentences():
        _version_of(subject, None)
        schema = current(subject)
        root = ROOT.parent
        if not (root / "pyproject.toml").is_file() or not (root / "tests/unit").is_dir():
            raise Misconfigured("new-version needs a source checkout; this is an installed package")
        files = new_files(schema)
        present = [name for name in files if (root / name).exists()]
        if present:
            raise Misconfigured(f"{present[0]} exists already: finish it, or remove it")
    for name, text in files.items():
        if not dry_run:
            (root / name).write_text(text, encoding="utf-8")
        typer.echo(f"{'would write' if dry_run else 'wrote'} {name}")
    by_version = isinstance(PLACES[subject][0], dict)
    topic = (
        f"{topics.USAGE_TOPICS[schema.version].rpartition('.v')[0]}.v{schema.version + 1}"
        if by_version
        else None
    )
    typer.echo("\nNothing starts until these are done (docs/evolution.md explains them):")
    for number, step in enumerate(remaining_steps(schema, topic), 1):
        typer.echo(f"{number:2}. {step}")


@contextmanager
def _catalog_sentences(status: int = MISUSED) -> Iterator[None]:
    """As ``sentences``; ``status`` is for released files that cannot be read."""
    from schemas.catalog import CatalogError

    with sentences():
        try:
            yield
        except CatalogError as error:
            raise fail(str(error), status) from None


def _proof() -> tuple[str | None, int]:
    """What does not hold, or how many corpus records came through the chain."""
    from schemas.catalog import CatalogError, check_catalog
    from upcasters.chain import ChainError, check_chain, upcasters

    try:
        check_catalog()
        return None, check_chain(upcasters())
    except (CatalogError, ChainError) as error:
        return str(error), 0


def _version_of(subject: str, version: int | None) -> int:
    from schemas.catalog import CURRENT_VERSIONS, released

    if subject not in CURRENT_VERSIONS:
        raise Misconfigured(f"no subject {subject}; there are {', '.join(CURRENT_VERSIONS)}")
    version = version or CURRENT_VERSIONS[subject]
    if (subject, version) not in released():
        raise Misconfigured(f"no version {version} of {subject}")
    return version


def _document(subject: str, name: str) -> Any:
    """The schema document of a version, a revision or a file."""
    from schemas.catalog import released, writers
    from schemas.evolution import refusals

    if re.fullmatch(r"[0-9]+", name):
        return released()[subject, _version_of(subject, int(name))].document
    if re.fullmatch(r"[0-9]+\.[0-9]+", name):
        for schema in writers():
            if schema.subject == subject and f"{schema.version}.{schema.revision}" == name:
                return schema.document
        raise Misconfigured(f"no revision {name} of {subject}")
    try:
        document = json.loads(Path(name).read_bytes())
    except OSError as error:
        raise Misconfigured(f"cannot read {name}: {error.strerror}") from None
    except ValueError:
        raise Misconfigured(f"{name} is not JSON") from None
    for unfit in refusals(document):
        raise Misconfigured(f"{name}: {unfit.code} at {unfit.path}: {unfit.why}")
    return document


def _topic(subject: str, version: int) -> str:
    place = PLACES[subject][0]
    return place if isinstance(place, str) else place.get(version, "–")


def _writer(schema: Schema) -> str:
    from schemas.catalog import current

    return PLACES[schema.subject][1] if schema is current(schema.subject) else "older releases"


def _path(schema: Schema) -> str:
    from upcasters.chain import ChainError, MissingUpcaster, upcasters

    try:
        steps = upcasters().path(schema.subject, schema.version)
    except (ChainError, MissingUpcaster):
        return "broken"
    return " → ".join([f"v{schema.version}", *(f"v{step.target}" for step in steps)]) if steps else "–"


def _show_differences(found: Sequence[Difference]) -> None:
    columns = ("path", "code", "before", "after", "new_reads_old", "old_reads_new", "why")
    if found:
        show_table(columns, [[_cell(getattr(one, name)) for name in columns] for one in found])


def _cell(value: Any) -> str:
    """Short: a changed doc is a paragraph, and is whole in the JSON."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if len(value) <= CELL_CHARS_MAX else f"{value[: CELL_CHARS_MAX - 1]}…"
