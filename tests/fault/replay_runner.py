"""A process that carries replays out, in steps small enough to be killed between any two."""

from __future__ import annotations

import time

from services.replay import log, recompute, running
from services.streaming.database import TRANSIENT_ERRORS
from services.wire.settings import load_settings


def main() -> None:
    log.BATCH_RECORDS = 200
    recompute.HELD_MAX = 100
    running._FLUSH_SECONDS = 0.0
    replayer = running.Replayer(load_settings())
    print("ready", flush=True)
    while True:
        try:
            with replayer.connect() as db:
                while True:
                    if replayer.step(db) is None:
                        time.sleep(0.05)
        except TRANSIENT_ERRORS:
            time.sleep(0.2)


if __name__ == "__main__":
    main()
