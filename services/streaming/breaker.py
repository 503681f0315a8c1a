"""Stop a partition before a bad release drains it into the parked topics.

Pure. A breaker is the list of the newest parked offsets of a partition, kept with its position.
"""

from __future__ import annotations

from collections.abc import Iterable

WINDOW_RECORDS = 10_000
PARKED_IN_WINDOW_MAX = 100
PARKED_IN_A_ROW_MAX = 99


def feed(parked: list[int], new: Iterable[int]) -> tuple[list[int], int | None]:
    """Add newly parked offsets, ascending; returns the list to keep and the offset that trips, if any.

    It trips at the 100th parked record in a row, or at the first that makes more than 1 % of the last 10,000
    offsets. The tripping record itself is not added: the partition stops in front of it.
    """
    kept = list(parked)
    for offset in new:
        in_a_row = (
            len(kept) >= PARKED_IN_A_ROW_MAX and offset - kept[-PARKED_IN_A_ROW_MAX] == PARKED_IN_A_ROW_MAX
        )
        in_window = (
            len(kept) >= PARKED_IN_WINDOW_MAX and offset - kept[-PARKED_IN_WINDOW_MAX] < WINDOW_RECORDS
        )
        if in_a_row or in_window:
            return kept, offset
        kept = [*kept[-(PARKED_IN_WINDOW_MAX - 1) :], offset]
    return kept, None
