"""``tidemeter demo``: the whole product on this machine, with a proof at the end."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from services.cli.common import ATTENTION, INTERRUPTED, MISUSED, UNAVAILABLE, JsonFlag, fail
from services.wire.decimals import plain
from services.wire.log import configure_logging

if TYPE_CHECKING:
    from services.demo.proof import Proof
    from services.embedded.stack import Stack

PLAIN_EVERY_S = 3.0


class _Display:
    """Live table on a terminal, plain lines elsewhere; all on stderr."""

    def __init__(self, console: Console, live: Live | None) -> None:
        self._console = console
        self._live = live
        self._shown = 0.0

    def show(self, kind: str, data: dict[str, Any]) -> None:
        if kind != "progress":
            self._console.print(data["text"], highlight=False)
        elif self._live is not None:
            self._live.update(_progress_table(data))
        elif time.monotonic() - self._shown >= PLAIN_EVERY_S:
            self._shown = time.monotonic()
            deltas = data["deltas"]
            self._console.print(
                f"{data['acknowledged']}/{data['planned']} acknowledged, {data['records']} with an outcome, "
                f"{deltas['reported']['count']} deltas at Stripe, gap {data['conservation_gap']}",
                highlight=False,
            )


def _progress_table(data: dict[str, Any]) -> Table:
    table = Table("stage", "so far")
    table.add_row("acknowledged", f"{data['acknowledged']} of {data['planned']}")
    table.add_row("records with an outcome", str(data["records"]))
    for outcome, number in data["outcomes"].items():
        table.add_row(f"  {outcome}", str(number))
    table.add_row("conservation gap", str(data["conservation_gap"]))
    table.add_row("items to close", str(data["waiting"]["items_to_close"]))
    for state in ("pending", "in_flight", "in_doubt", "reported", "failed"):
        table.add_row(f"deltas {state}", str(data["deltas"][state]["count"]))
    return table


@contextlib.contextmanager
def _display() -> Iterator[_Display]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Display(console, None)
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        yield _Display(console, live)


def demo(
    events: Annotated[int, typer.Option(min=100, max=1_000_000, help="Records to send.")] = 20_000,
    seed: Annotated[int, typer.Option(help="The same seed plans the same traffic.")] = 7,
    once: Annotated[bool, typer.Option("--once", help="End after the proof instead of staying up.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Run everything on this machine with seeded traffic, kill a worker in the middle, and prove the sums.

    Exit status 0 only if the proof holds. With --json the last line of output is the proof as one object.

    Example: tidemeter demo --events 20000 --seed 7 --once --json
    """
    from services.demo.run import run_demo
    from services.embedded import EmbeddedError
    from services.wire.errors import Misconfigured, Transient

    configure_logging("error", service="demo")
    try:
        with _display() as display:
            proof = run_demo(events, seed, display.show, on_done=None if once else _stay(as_json))
    except (EmbeddedError, Misconfigured) as error:
        raise fail(str(error), MISUSED) from None
    except (Transient, TimeoutError) as error:
        raise fail(str(error), UNAVAILABLE) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print(json.dumps(proof.document()))
    else:
        print_proof(proof)
    sys.stdout.flush()
    if not proof.holds:
        raise typer.Exit(ATTENTION)


def _stay(as_json: bool) -> Any:
    def stay(stack: Stack, proof: Proof) -> None:
        print_proof(proof)
        typer.echo(
            f"Still running: API http://127.0.0.1:{stack.member('ingest').port}/docs, "
            f"Stripe simulator {stack.stripe_base}/_simulator/totals. Ctrl-C ends it.",
            err=True,
        )
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                stack.supervise()
                time.sleep(0.5)

    return stay


def print_proof(proof: Proof) -> None:
    """The proof as tables."""
    console = Console()
    outcomes = Table("outcome", "records", "oracle", title="What became of every record")
    counted = proof.outcomes["counted"] + proof.outcomes["late_counted"]
    for name, number in proof.outcomes.items():
        outcomes.add_row(name, str(number), str(proof.expected_outcomes.get(name, "")))
    outcomes.add_row("counted in all", str(counted), str(proof.expected_outcomes.get("counted_in_all", 0)))
    outcomes.add_section()
    outcomes.add_row("acknowledged", str(proof.acknowledged), "")
    outcomes.add_row("conservation gap", str(proof.conservation_gap), "0")
    console.print(outcomes)
    totals = Table("total", "value", title="What it adds up to")
    totals.add_row("oracle", plain(proof.expected_total))
    totals.add_row("counters (PostgreSQL)", plain(proof.local_total))
    totals.add_row("Stripe's own ledger", plain(proof.stripe_total))
    totals.add_row("difference", plain(proof.stripe_difference))
    totals.add_row("hours that differ from the oracle", str(proof.wrong_buckets))
    totals.add_row("items that differ at Stripe", str(proof.wrong_items_at_stripe))
    console.print(totals)
    stages = Table(
        "stage", "items", "seconds", "per second", title=f"{proof.seconds:.1f} s, {proof.kills} SIGKILL"
    )
    for name, items, seconds, rate in proof.stages:
        stages.add_row(name, str(items), f"{seconds:.1f}", f"{rate:,.0f}")
    console.print(stages)
    for sentence in proof.failures:
        console.print(f"[bold red]does not hold[/]: {sentence}")
    console.print("The proof holds." if proof.holds else "The proof does not hold.")
