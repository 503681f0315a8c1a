"""``tidemeter send``: usage events from a file or standard input, to the API or straight to Kafka.

Every line has its own idempotency key, so a file can be sent again, whole, after any failure: what was stored
before is a duplicate and not counted twice.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from services.cli.common import ATTENTION, INTERRUPTED, MISUSED, UNAVAILABLE, fail
from services.cli.send_files import Format, Line, RefusedLine, open_lines
from services.cli.send_sinks import KEY_VARIABLE, HttpSink, KafkaSink, Sink, deliver, event_document
from services.ingest.parse import Caller, Refusal
from services.producer import NotAcknowledged
from services.wire.errors import Misconfigured
from services.wire.settings import load_settings

BATCH_BYTES_MAX = 512 * 1024
PLAIN_EVERY_S = 5.0


@dataclass(slots=True)
class Summary:
    """What became of the lines that were read."""

    lines: int = 0
    accepted: int = 0
    refused: int = 0
    unavailable: int = 0
    interrupted: bool = False

    def exit_code(self) -> int:
        """130 interrupted, 3 unavailable, 1 some refused, else 0."""
        if self.interrupted:
            return INTERRUPTED
        if self.unavailable:
            return UNAVAILABLE
        return ATTENTION if self.refused else 0


class _Reporter:
    """Progress on standard error, refused lines into a file."""

    def __init__(self, errors: IO[str] | None, progress: Progress | None) -> None:
        self._errors = errors
        self._progress = progress
        self._task = progress.add_task("", total=None) if progress is not None else None
        self._shown_s = time.monotonic()

    def refused(self, line: RefusedLine) -> None:
        if self._errors is not None:
            refusal = line.refusal
            document = {
                "line": line.number,
                "idempotencyKey": refusal.idempotency_key,
                "code": refusal.code,
                "path": refusal.path,
                "message": refusal.message,
            }
            self._errors.write(json.dumps(document) + "\n")

    def show(self, summary: Summary) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=_sentence(summary))
        elif time.monotonic() - self._shown_s >= PLAIN_EVERY_S:
            self._shown_s = time.monotonic()
            print(_sentence(summary), file=sys.stderr)


def _sentence(summary: Summary) -> str:
    return f"{summary.lines} lines: {summary.accepted} accepted, {summary.refused} refused"


def run(
    lines: Iterator[Line | RefusedLine],
    sink: Sink,
    reporter: _Reporter,
    summary: Summary,
    *,
    give_up_s: float,
) -> None:
    """Send everything in order, in batches; stop at the first batch that stays unconfirmed.

    ``summary`` is kept up to date, so that it holds after an interruption too.

    Raises:
        Misconfigured: as :meth:`Sink.attempt`.
    """
    batch: list[Line] = []
    batch_bytes = 0

    def settle() -> bool:
        for line, outcome in zip(batch, deliver(sink, batch, give_up_s=give_up_s), strict=True):
            if isinstance(outcome, Refusal):
                summary.refused += 1
                reporter.refused(RefusedLine(line.number, outcome))
            elif outcome:
                summary.accepted += 1
            else:
                summary.unavailable += 1
        batch.clear()
        reporter.show(summary)
        return summary.unavailable == 0

    for line in lines:
        summary.lines += 1
        if isinstance(line, RefusedLine):
            summary.refused += 1
            reporter.refused(line)
            continue
        line_bytes = len(msgspec.json.encode(event_document(line.event)))
        if batch and (len(batch) >= sink.events_max or batch_bytes + line_bytes > BATCH_BYTES_MAX):
            if not settle():
                summary.unavailable += 1  # this line: read, but not sent
                return
            batch_bytes = 0
        batch.append(line)
        batch_bytes += line_bytes
    if batch:
        settle()


def _sink(kafka: str | None, api_url: str | None) -> Sink:
    if kafka is not None and api_url is not None:
        raise Misconfigured("give --api-url or --kafka, not both")
    if kafka is not None:
        return KafkaSink(kafka)
    key = os.environ.get(KEY_VARIABLE)
    if not key:
        raise Misconfigured(f"no API key: set {KEY_VARIABLE}; `tidemeter keys create` makes one")
    if api_url is None:
        settings = load_settings()
        api_url = f"http://{settings.http_host}:{settings.http_port}"
    return HttpSink(api_url, key)


def _progress(stack: ExitStack) -> Progress | None:
    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    return stack.enter_context(Progress(*columns, console=console, transient=True))


def send(
    file: Annotated[str, typer.Argument(metavar="FILE", help="NDJSON or CSV file; - is standard input.")],
    api_url: Annotated[
        str | None,
        typer.Option(envvar="TIDEMETER_API_URL", help="Address of the API (default: the configured one)."),
    ] = None,
    kafka: Annotated[str | None, typer.Option(help="Send straight to these brokers, past the API.")] = None,
    form: Annotated[
        Format | None, typer.Option("--format", help="Form of the lines (default: by the file's extension).")
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(help="Tenant of lines that name none; needed with --kafka.")
    ] = None,
    errors: Annotated[Path | None, typer.Option(help="Write refused lines here, as NDJSON.")] = None,
    give_up_after: Annotated[
        float, typer.Option(min=0, help="Seconds to retry while the API or Kafka is unavailable.")
    ] = 120.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Send usage events from FILE; safe to repeat after any failure.

    Fields are those of the API: metric, customerRef, quantity, idempotencyKey and, if wanted, ts, tenantId
    and meta (CSV: meta.NAME columns). The API key is read from TIDEMETER_API_KEY.

    Exit status: 0 all accepted, 1 some refused, 2 misused, 3 unavailable, 130 interrupted.

    Example: tidemeter send usage.csv --errors refused.ndjson
    """
    summary = Summary()
    try:
        with ExitStack() as stack:
            sink = _sink(kafka, api_url)
            stack.callback(_close_quietly, sink)
            lines = open_lines(file, form, Caller(tenant), stack)
            refused = stack.enter_context(errors.open("w", encoding="utf-8")) if errors is not None else None
            reporter = _Reporter(refused, _progress(stack))
            try:
                run(lines, sink, reporter, summary, give_up_s=give_up_after)
            except KeyboardInterrupt:
                summary.interrupted = True
    except (Misconfigured, OSError) as error:
        if summary.accepted:
            print(f"{summary.accepted} events were acknowledged before", file=sys.stderr)
        raise fail(str(error), MISUSED) from None
    _report(summary, as_json)
    raise typer.Exit(summary.exit_code())


def _close_quietly(sink: Sink) -> None:
    with suppress(NotAcknowledged):  # counted already, as unavailable
        sink.close()


def _report(summary: Summary, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(summary)))
    else:
        print(_sentence(summary))
    again = "run the same command again: what was acknowledged is not counted twice"
    if summary.interrupted:
        print(
            f"interrupted: {summary.accepted} events are known to be acknowledged; {again}", file=sys.stderr
        )
    elif summary.unavailable:
        print(
            f"gave up: {summary.unavailable} events are not confirmed, later ones not sent; {again}",
            file=sys.stderr,
        )
