"""Carry out, in a thread of its own, the replays that are asked for: for the replayer, and for a command.

Promises: told to stop, it stops within seconds, in front of what it would have written next. The replay stays
``running``, and whoever looks next goes on with it from its last flush.
"""

from __future__ import annotations

import contextlib
import random
import threading

import psycopg
import structlog

from services.replay.recompute import Connection
from services.replay.running import Replayer
from services.streaming.database import TRANSIENT_ERRORS
from services.streaming.observe import Status
from services.wire import metrics
from services.wire.errors import Transient
from services.wire.settings import Settings

LOOK_SECONDS = 1.0
PAUSE_MAX_SECONDS = 15.0
#: For records that are being read; then for PostgreSQL to give up a statement.
STOP_SECONDS, CANCEL_SECONDS = 3.0, 5.0

log = structlog.get_logger(__name__)


class Stopped(Transient):
    """This process is told to stop. For the replay that is as if the world were away."""


def replayer_of(settings: Settings) -> Replayer:
    """The replayer of these settings.

    Raises:
        Misconfigured: a setting that it needs is missing.
        Transient: a schema registry is configured and does not answer.
    """
    settings.kafka()
    settings.postgres()
    return Replayer(settings)


class Carrier:
    """Looks for replays and carries them out until :meth:`stop`. A broken invariant ends the thread:
    ``failure`` has it, and ``ended`` is set."""

    def __init__(self, settings: Settings, *, look_seconds: float = LOOK_SECONDS) -> None:
        """Raises what :func:`replayer_of` does."""
        self._replayer = replayer_of(settings)
        self._look_seconds = look_seconds
        self._stop = threading.Event()
        self._db: Connection | None = None
        self._waiting_for: str | None = None
        self.progress = (0, 0)  #: records read, and of how many; of the replay that runs here
        self.failure: BaseException | None = None
        self.ended = threading.Event()
        # Not a thread of a pool: the process would wait for one that hangs in a server.
        self._thread = threading.Thread(target=self._run, name="replayer", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Stop, and wait for it: for seconds, however long the statement under way would take."""
        self._stop.set()
        self._thread.join(STOP_SECONDS)
        db = self._db
        if self._thread.is_alive() and db is not None:
            with contextlib.suppress(psycopg.Error):
                db.cancel_safe(timeout=1.0)
            self._thread.join(CANCEL_SECONDS)

    def check(self) -> tuple[Status, str]:
        """For ``/health/ready``."""
        if self._waiting_for is not None:
            return "unhealthy", f"waiting for {self._waiting_for}"
        read, total = self.progress
        return "healthy", f"read {read} of {total} records" if total else "works"

    def _run(self) -> None:
        try:
            self._look_forever()
        except BaseException as error:
            self.failure = error
        finally:
            self.ended.set()

    def _look_forever(self) -> None:
        pause = self._look_seconds
        while not self._stop.is_set():
            try:
                with self._replayer.connect() as db:
                    self._db = db
                    while not self._stop.is_set():
                        found = self._replayer.step(db, self._note)
                        self._told(0, 0)
                        self._waiting_for, pause = None, self._look_seconds
                        if found is None:
                            self._stop.wait(self._look_seconds)
            except Stopped:
                return
            except TRANSIENT_ERRORS as error:
                self._told(0, 0)
                if self._stop.is_set():
                    return
                self._waiting_for = "PostgreSQL" if isinstance(error, psycopg.Error) else "Kafka"
                metrics.RETRIES.labels(self._waiting_for).inc()
                log.warning("waiting", world=self._waiting_for, error=error)
                self._stop.wait(pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads, guards nothing
                pause = min(2 * pause, PAUSE_MAX_SECONDS)
            finally:
                self._db = None

    def _note(self, read: int, total: int) -> None:
        if self._stop.is_set():
            raise Stopped("told to stop")
        self._told(read, total)

    def _told(self, read: int, total: int) -> None:
        self.progress = read, total
        metrics.REPLAY_RECORDS.labels("read").set(read)
        metrics.REPLAY_RECORDS.labels("total").set(total)
