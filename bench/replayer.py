"""The replaying process of the benchmark: ``python -m bench.replayer scan ROUNDS | repair SINCE UNTIL``.

The job comes as for every contestant; the answers are lines of JSON.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from datetime import UTC, datetime

import psutil
from confluent_kafka import Consumer, TopicPartition

from bench.generator import TENANT
from bench.product import redirect
from bench.rivals import Job, read_job
from services.replay import ranges, running
from services.streaming import replays
from services.streaming.replay_plan import Plan
from services.streaming.replays import ReplayRequest
from services.wire.codec import Decoder
from services.wire.settings import Settings

EVERYTHING = {"since": "-PT840H", "force": True}


def main() -> None:
    """Do what the arguments say."""
    os.environ.setdefault("TIDEMETER_LOG_LEVEL", "warning")
    job = read_job()
    redirect(job)
    ranges.GROUP = running.GROUP = job.group
    replayer = running.Replayer(Settings(kafka_bootstrap=job.bootstrap, postgres_dsn=job.dsn))
    if sys.argv[1] == "scan":
        scan(job, replayer, int(sys.argv[2]))
    else:
        repair(replayer, *sys.argv[2:4])


def say(**answer: object) -> None:
    """One line for the owner."""
    print(json.dumps(answer), flush=True)


def scan(job: Job, replayer: running.Replayer, rounds: int) -> None:
    """Dry runs and bare reading in turns; memory is that of the first dry run."""
    memory = Memory()
    request = ReplayRequest(tenant_id=TENANT, **EVERYTHING)
    bare_rates, rates = [], []
    plan: Plan | None = None
    for number in range(rounds):
        began = time.perf_counter()
        plan = replayer.dry_run(request, progress=memory.note if number == 0 else lambda *_: None)
        rates.append(plan.records_read / (time.perf_counter() - began))
        bare_rates.append(bare(job))
    assert plan is not None
    say(
        bare=bare_rates,
        replay=rates,
        resident_megabytes=memory.megabytes,
        changed=plan.changed_hours + plan.changed_values + plan.changed_periods + plan.changed_watermarks,
        totals={one.meter: str(one.after) for one in plan.totals},
    )


class Memory:
    """Resident memory at each tenth of the way, in megabytes."""

    def __init__(self) -> None:
        self.megabytes: list[int] = []
        self._process = psutil.Process()

    def note(self, done: int, total: int) -> None:
        """Told by a dry run."""
        if done * 10 >= total * (len(self.megabytes) + 1):
            self.megabytes.append(round(self._process.memory_info().rss / 1e6))


def bare(job: Job) -> float:
    """Events per second of a consumer that only decodes."""
    consumer = Consumer(
        {
            "bootstrap.servers": job.bootstrap,
            "group.id": f"{job.group}-bare",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "queued.max.messages.kbytes": 32 * 1024,
        }
    )
    decode = Decoder().decode
    began = time.perf_counter()
    consumer.assign([TopicPartition(job.topic, number, 0) for number in range(job.partitions)])
    number = ended = 0
    while ended < job.partitions:
        for message in consumer.consume(10_000, 1.0):
            if message.error() is not None:
                ended += 1
                continue
            decode(message.value() or b"")
            number += 1
    rate = number / (time.perf_counter() - began)
    consumer.close()
    return rate


def repair(replayer: running.Replayer, since: str, until: str) -> None:
    """Apply a replay of the window when told to."""
    with replayer.connect() as db:
        say(ready=True, peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        sys.stdin.readline()
        request = ReplayRequest(tenant_id=TENANT, since=since, until=until, mode="apply", force=True)
        now = datetime.now(UTC)
        scope = replays.resolve(db, request, now)
        replay_id = replays.request_apply(db, request, scope, by="bench", now=now)
        assert replayer.step(db) == replay_id
        done = replays.show(db, replay_id)
        assert done["state"] == "done", done["error"]
        say(changed=done["result"]["changedHours"])


if __name__ == "__main__":
    main()
