"""Lateness: which outcome; and inside the window, order and chunking change nothing. Steps 4 to 6, pure."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.counters.config import Configuration
from services.counters.ledger import FirstSeen, _decide
from services.counters.periods import Calendar
from services.counters.prepare import OUTCOMES, Preparer
from services.counters.windows import OLDEST_US, Arrival, classify
from services.wire.codec import Decoder
from services.wire.pgarrays import EPOCH_US, MINUS_INFINITY
from tests.records import ARRIVAL_US, DAY_US, HOUR_US, UNIT, Raw, chunk_of, configuration, encoded, meter, v3
from upcasters.chain import upcasters

PREPARER = Preparer(Decoder(), upcasters())
NEVER = MINUS_INFINITY + EPOCH_US  # what a new item's watermark, -infinity, reads as
LATENESS = 2 * DAY_US
W = ARRIVAL_US - HOUR_US


@pytest.mark.parametrize(
    ("occurred", "watermark", "lateness", "expected"),
    [
        (W, W, LATENESS, Arrival.ON_TIME),
        (W + 1, W, LATENESS, Arrival.ON_TIME),
        (W - 1, W, LATENESS, Arrival.LATE),
        (W - LATENESS, W, LATENESS, Arrival.LATE),
        (W - LATENESS - 1, W, LATENESS, Arrival.TOO_LATE),
        (W - 1, W, 0, Arrival.TOO_LATE),
        (W, W, 0, Arrival.ON_TIME),
        (ARRIVAL_US - OLDEST_US, NEVER, LATENESS, Arrival.ON_TIME),
        (ARRIVAL_US - OLDEST_US - 1, NEVER, LATENESS, Arrival.TOO_LATE),
        (ARRIVAL_US - OLDEST_US - 1, ARRIVAL_US - OLDEST_US - 2, 35 * DAY_US, Arrival.TOO_LATE),
        (ARRIVAL_US, NEVER, 0, Arrival.ON_TIME),
    ],
    ids=[
        "at the watermark",
        "above it",
        "just below it",
        "at the end of the window",
        "just past the window",
        "no window",
        "no window, at the watermark",
        "first, as old as Stripe takes",
        "first, older than Stripe takes",
        "above the watermark, but older than Stripe takes",
        "first of its item",
    ],
)
def test_an_event_is_judged_by_its_items_watermark_and_its_meters_lateness(
    occurred: int, watermark: int, lateness: int, expected: Arrival
) -> None:
    assert classify(occurred, watermark, lateness, ARRIVAL_US) is expected


class InMemory:
    """What PostgreSQL keeps between chunks, as far as outcomes depend on it."""

    def __init__(self, config: Configuration) -> None:
        self._config = config
        self._seen: dict[bytes, FirstSeen] = {}
        self._next_offset = 0
        self.watermarks: dict[bytes, int] = {}
        self.sums: dict[tuple[bytes, int, int], int] = defaultdict(int)
        self.outcomes: dict[str, int] = dict.fromkeys(OUTCOMES, 0)

    def feed(self, records: list[dict[str, Any]]) -> None:
        """One chunk."""
        raws = [Raw(self._next_offset + index, encoded(record)) for index, record in enumerate(records)]
        self._next_offset += len(raws)
        prepared = PREPARER.prepare(chunk_of(raws), self._config)
        for item in prepared.items.values():
            item.watermark = self.watermarks.get(item.item_id, NEVER)
        known = {event[1]: self._seen[event[1]] for event in prepared.events if event[1] in self._seen}
        _decide(prepared, known)
        for index, event_id, digest, *_ in prepared.events:
            self._seen.setdefault(event_id, FirstSeen(digest, 3, 0, raws[index].offset))
        for item in prepared.items.values():
            assert item.watermark >= self.watermarks.get(item.item_id, NEVER), "the watermark went back"
            self.watermarks[item.item_id] = item.watermark
            for (hour, period), (total, _, _) in item.buckets.items():
                self.sums[item.item_id, hour, period] += total
        for account in prepared.accounts.values():
            for outcome in OUTCOMES:
                self.outcomes[outcome] += getattr(account, outcome)
        assert not prepared.parked
        assert sum(self.outcomes.values()) == self._next_offset


CONFIG = configuration(meter(calendar=Calendar("Asia/Kathmandu")))

#: Events of three customers inside one lateness window, in hours around the end of a month.
inside_the_window = st.lists(
    st.builds(
        lambda number, customer, ago, quantity: v3(
            idempotency_key=f"evt-{number}",
            customer_ref=f"cust-{customer}",
            occurred_at=ARRIVAL_US - ago,
            quantity=quantity,
        ),
        st.integers(0, 10**9),
        st.integers(0, 2),
        st.integers(0, LATENESS),
        st.integers(0, 10**12),
    ),
    min_size=1,
    max_size=15,
    unique_by=lambda record: record["idempotency_key"],
)


def split(data: st.DataObject, records: list[Any]) -> list[list[Any]]:
    """``records`` cut into chunks somewhere."""
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(records) - 1)), max_size=4)))
    edges = [0, *[cut for cut in cuts if cut < len(records)], len(records)]
    return [records[start:end] for start, end in zip(edges, edges[1:], strict=False)]


@given(inside_the_window, st.data())
@settings(max_examples=200, deadline=None)
def test_any_order_of_arrival_in_any_chunks_gives_the_same_sums_and_nothing_is_adjusted(
    records: list[dict[str, Any]], data: st.DataObject
) -> None:
    expected: dict[tuple[str, int], int] = defaultdict(int)
    for record in records:
        hour = record["occurred_at"] // HOUR_US
        expected[record["customer_ref"], hour] += int.from_bytes(record["quantity"], "big")

    arrivals = data.draw(st.permutations(records))
    again = data.draw(st.lists(st.sampled_from(records), max_size=5))
    store = InMemory(CONFIG)
    for chunk in split(data, [*arrivals, *again]):
        store.feed(chunk)

    assert store.outcomes["adjusted"] == store.outcomes["conflict"] == 0
    assert store.outcomes["counted"] + store.outcomes["late_counted"] == len(records)
    assert store.outcomes["duplicate"] == len(again)
    assert sum(store.sums.values()) == sum(expected.values())
    by_hour: dict[int, int] = defaultdict(int)
    for (_, hour, _), total in store.sums.items():
        by_hour[hour // HOUR_US] += total
    assert {hour: total for hour, total in by_hour.items() if total} == _sum_by_hour(expected)


def _sum_by_hour(expected: dict[tuple[str, int], int]) -> dict[int, int]:
    sums: dict[int, int] = defaultdict(int)
    for (_, hour), total in expected.items():
        sums[hour] += total
    return {hour: total for hour, total in sums.items() if total}


@given(inside_the_window, st.data())
@settings(max_examples=100, deadline=None)
def test_the_watermark_is_the_greatest_time_counted_however_the_events_are_chunked(
    records: list[dict[str, Any]], data: st.DataObject
) -> None:
    store = InMemory(CONFIG)
    for chunk in split(data, data.draw(st.permutations(records))):
        store.feed(chunk)
    newest: dict[str, int] = {}
    for record in records:
        newest[record["customer_ref"]] = max(newest.get(record["customer_ref"], 0), record["occurred_at"])
    assert sorted(store.watermarks.values()) == sorted(newest.values())


def ago(hours: float, key: str, quantity: int, **changes: Any) -> dict[str, Any]:
    return v3(
        idempotency_key=key,
        occurred_at=ARRIVAL_US - int(hours * HOUR_US),
        quantity=quantity * UNIT,
        **changes,
    )


def total_after(*chunks: list[dict[str, Any]], **changes: Any) -> tuple[int, dict[str, int]]:
    store = InMemory(configuration(meter(**changes)))
    for chunk in chunks:
        store.feed(chunk)
    return sum(store.sums.values()) // UNIT, {name: n for name, n in store.outcomes.items() if n}


def test_a_duplicate_is_not_counted_and_a_late_event_is() -> None:
    events = [ago(3, "a", 100), ago(2, "b", 250), ago(3, "a", 100), ago(20, "c", 75)]
    expected = (425, {"counted": 2, "duplicate": 1, "late_counted": 1})
    assert total_after(events) == expected
    assert total_after(*([event] for event in events)) == expected


def test_an_event_past_the_window_is_one_adjustment_and_not_counted() -> None:
    assert total_after([ago(0, "a", 5)], [ago(9 * 24, "b", 2)]) == (5, {"counted": 1, "adjusted": 1})
    again = [ago(9 * 24, "b", 2)]
    assert total_after([ago(0, "a", 5)], again, again) == (5, {"counted": 1, "adjusted": 1, "duplicate": 1})


def test_a_late_event_never_moves_the_watermark() -> None:
    store = InMemory(CONFIG)
    store.feed([ago(1, "a", 1), ago(30, "b", 1), ago(9 * 24, "c", 1)])
    assert list(store.watermarks.values()) == [ARRIVAL_US - HOUR_US]


def test_the_first_content_of_a_key_stays_counted_in_one_chunk_or_in_two() -> None:
    first, other = ago(1, "a", 100), ago(1, "a", 101)
    expected = (100, {"counted": 1, "conflict": 1})
    assert total_after([first, other]) == expected
    assert total_after([first], [other]) == expected


def test_items_of_two_customers_do_not_make_each_other_late() -> None:
    events = [ago(0, "a", 1), ago(30 * 24, "b", 2, customer_ref="cust-2")]
    assert total_after(events) == (3, {"counted": 2})


def test_two_events_of_one_microsecond_with_different_keys_both_count() -> None:
    assert total_after([ago(1, "a", 1), ago(1, "b", 1)]) == (2, {"counted": 2})


def test_an_event_on_the_edge_of_a_period_counts_only_in_the_one_that_starts_there() -> None:
    march = 1_772_302_500_000_000  # 2026-02-28T18:15:00Z, midnight in Kathmandu
    store = InMemory(CONFIG)
    store.feed(
        [v3(idempotency_key="before", occurred_at=march - 1), v3(idempotency_key="edge", occurred_at=march)]
    )
    hours = {hour for _, hour, _ in store.sums}
    periods = sorted(period for _, _, period in store.sums)
    assert len(hours) == 1
    assert len(periods) == 2
    assert periods[1] == march
