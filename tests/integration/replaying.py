"""What tests of replays share: commands that read slowly enough to be met in the middle of it."""

from __future__ import annotations

import sys

_SLOW = """
import sys, time
from services.cli.main import main
from services.replay import log, running
from services.replay.recompute import Recount
take = Recount.take
def slowly(self, *arguments, **named):
    time.sleep({pause})
    return take(self, *arguments, **named)
log.BATCH_RECORDS, running._FLUSH_SECONDS, Recount.take = 500, 0.0, slowly
sys.argv = {arguments!r}
main()
"""


def slowly(pause: float, *arguments: str) -> list[str]:
    """``tidemeter`` that reads 500 records at a time, pauses as many seconds, and flushes each time."""
    return [sys.executable, "-c", _SLOW.format(pause=pause, arguments=["tidemeter", *arguments])]
