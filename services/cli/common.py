"""What commands share: errors become one sentence and an exit status; PostgreSQL connections."""

from __future__ import annotations

import getpass
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import psycopg
import typer
from rich.console import Console
from rich.table import Column, Table

from services.wire.errors import Misconfigured, Transient
from services.wire.settings import Settings, load_settings

PIPE_WIDTH = 400

ATTENTION, MISUSED, UNAVAILABLE, INTERRUPTED = 1, 2, 3, 130

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]


def fail(message: str, code: int) -> typer.Exit:
    """Print ``error: message`` and give the exception to raise."""
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(code)


def operator() -> str:
    """Who acts, for the audit log: this system's user."""
    return f"cli:{getpass.getuser()}"


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table that hides nothing: a terminal folds long cells, a pipe or a file gets long lines."""
    table = Table(*(Column(name, overflow="fold") for name in columns), box=None)
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    console.print(table)


@contextmanager
def sentences() -> Iterator[None]:
    """Turn the errors an operator can act on into one sentence on stderr and an exit status."""
    try:
        yield
    except Misconfigured as error:
        raise fail(str(error), MISUSED) from None
    except psycopg.errors.UndefinedTable:
        raise fail(
            "the database has no tables yet: run `tidemeter migrate` or `tidemeter up`", MISUSED
        ) from None
    except psycopg.OperationalError:
        raise fail("PostgreSQL does not answer; check TIDEMETER_POSTGRES_DSN", UNAVAILABLE) from None
    except Transient as error:
        raise fail(str(error), UNAVAILABLE) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def database(settings: Settings | None = None) -> Iterator[psycopg.Connection[Any]]:
    """A connection in autocommit mode; transactions are explicit."""
    dsn = (settings or load_settings()).postgres()
    with psycopg.connect(
        dsn, autocommit=True, connect_timeout=5, application_name="tidemeter-cli"
    ) as connection:
        yield connection
