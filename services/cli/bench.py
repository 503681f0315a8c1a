"""``tidemeter bench``: measure what the documentation claims, here and now."""

from __future__ import annotations

import inspect
import json
import signal
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from services.wire.errors import Misconfigured, Transient
from services.wire.log import configure_logging

#: Name to module; each has ``run``, ``render`` and the ``KEY`` of its result.
BENCHES = {
    "counting": "bench.counting",
    "late": "bench.late_events",
    "push": "bench.push",
    "poison": "bench.poison",
    "bridge": "bench.bridge",
    "replay": "bench.replay",
    "growth": "bench.growth",
}

WRONG, MISUSED, UNAVAILABLE, INTERRUPTED = 1, 2, 3, 130


def _fail(message: str, code: int) -> typer.Exit:
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(code)


def bench(
    name: Annotated[
        str | None, typer.Argument(help=f"One of {', '.join(BENCHES)} [default: all].", show_default=False)
    ] = None,
    events: Annotated[
        int | None,
        typer.Option(min=1, help="Number of events [default: the benchmark's own].", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the generated events.")] = 1,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=30,
            help="Rounds to take the median of [default: the benchmark's own].",
            show_default=False,
        ),
    ] = None,
    items: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="growth: number of items, once for each size [default: 10 thousand to 1 million].",
            show_default=False,
        ),
    ] = None,
    seen: Annotated[
        int | None,
        typer.Option(
            min=0, help="growth: idempotency keys seen before [default: 10 million].", show_default=False
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each result as one line of JSON, and nothing else.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Put the results into this JSON file [default: bench/results.json].", show_default=False
        ),
    ] = None,
) -> None:
    """Run the benchmarks and keep their results; other keys of the file stay as they are.

    Runs on the servers of TIDEMETER_KAFKA_BOOTSTRAP and TIDEMETER_POSTGRES_DSN, in topics and databases of
    its own that it removes again; without these, on embedded servers in a temporary directory.
    The growth benchmark fills databases first: it takes minutes, and some gigabytes of disk for that time.

    Exit status: 0 done and exact, 1 a sum is wrong or a contestant failed, 2 misused, 3 unavailable,
    130 interrupted.

    Example: tidemeter bench counting --events 100000
    """
    from services.embedded import EmbeddedError

    if name is not None and name not in BENCHES:
        raise _fail(f"no benchmark {name}; there are {', '.join(BENCHES)}", MISUSED)
    options = {"events": events, "seed": seed, "rounds": rounds, "items": items or None, "seen": seen}
    configure_logging("warning")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # or nobody would clean up
    console = Console(stderr=True)

    def say(line: str) -> None:
        console.print(line, highlight=False, style="dim", soft_wrap=True)

    try:
        results = _run([name] if name is not None else list(BENCHES), options, say, out, as_json)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except Misconfigured as error:
        raise _fail(str(error), MISUSED) from None
    except (EmbeddedError, Transient) as error:
        raise _fail(str(error), UNAVAILABLE) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    if not all(result["checked"] for result in results.values()):
        raise _fail("a sum is not exact; see above", WRONG)


def _run(
    names: list[str],
    options: dict[str, Any],
    say: Callable[[str], None],
    out: Path | None,
    as_json: bool,
) -> dict[str, dict[str, Any]]:
    """Run ``names`` one after the other on the same servers; each result is kept as soon as it is there."""
    try:
        modules = {name: import_module(BENCHES[name]) for name in names}
    except ModuleNotFoundError as error:
        raise Misconfigured(f"{error.name} is not installed: pip install 'tidemeter[embedded]'") from error
    from bench.processes import ContestantFailed
    from bench.results import RESULTS, merge
    from bench.servers import servers

    given = {name: value for name, value in options.items() if value is not None}
    takes = {name: inspect.signature(module.run).parameters for name, module in modules.items()}
    for option in given:
        if not any(option in parameters for parameters in takes.values()):
            raise Misconfigured(f"benchmark {' or '.join(names)} takes no --{option}")
    path = out or RESULTS
    results: dict[str, dict[str, Any]] = {}
    say("starting")
    with servers() as here:
        for name, module in modules.items():
            ours = {option: value for option, value in given.items() if option in takes[name]}
            try:
                result = module.run(here, say=say, **ours)
            except ContestantFailed as error:
                raise _fail(str(error), WRONG) from None
            results[module.KEY] = result
            try:
                merge(path, {module.KEY: result})
            except (OSError, ValueError) as error:
                raise Misconfigured(f"cannot write {path}: {error}") from error
            if as_json:
                typer.echo(json.dumps({"bench": name, **result}))
            else:
                Console().print(module.render(result))
    return results
