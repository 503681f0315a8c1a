"""Our own counters worker, under the rules of the rivals: the real process, on a topic and group of its own.

Deltas are not closed meanwhile; no rival makes any.
"""

from __future__ import annotations

from bench.product import count_until_killed

NO_DELTAS_SECONDS = 86_400

if __name__ == "__main__":
    count_until_killed(TIDEMETER_DELTA_INTERVAL_SECONDS=str(NO_DELTAS_SECONDS))
