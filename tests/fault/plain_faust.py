"""A plain Faust app, as Faust's own pages show one; run as ``plain_faust.py <mode> …`` by the canaries.

raise     an agent whose body raises at the value 5
count     an agent that counts into a table, and prints the sum
idle      ``web_enabled=False``, started as this product starts its app
worker …  the same, started by the command line of Faust with the arguments that follow
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import faust

MODE, NAME = sys.argv[1], os.environ["CANARY"]
app = faust.App(
    NAME,
    broker=f"kafka://{os.environ['CANARY_KAFKA']}",
    store="memory://",
    datadir=Path(os.environ["CANARY_DIRECTORY"]),
    topic_partitions=1,
    broker_commit_interval=1.0,
    consumer_auto_offset_reset="earliest",
    consumer_group_instance_id=NAME,  # or each restart waits for the dead member's session
    web_enabled=False,
)
source = app.topic(NAME, value_type=int)

if MODE == "raise":

    @app.agent(source)
    async def consume(stream: Any) -> None:
        async for value in stream:
            print("saw", value, flush=True)
            if value == 5:
                raise RuntimeError("the body of the agent raises")


if MODE == "count":
    counts = app.Table("counts", default=int, partitions=1)

    @app.agent(source)
    async def count(stream: Any) -> None:
        async for value in stream:
            counts[value % 10] += 1

    @app.timer(0.1)
    async def tell() -> None:
        print("sum", sum(counts.values()), flush=True)


async def start() -> None:
    await app.start()
    print("started", flush=True)
    await asyncio.Event().wait()


if MODE == "worker":
    app.main()
else:
    asyncio.run(start())
