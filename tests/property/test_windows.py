"""Lateness: which outcome; and what events do to the hours of an item, in any order. Steps 4 to 6, pure."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from services.counters.config import Configuration
from services.counters.ledger import FirstSeen, decide
from services.counters.prepare import OUTCOMES, Account, Item, Preparer
from services.counters.windows import OLDEST_US, Arrival, add, classify
from services.wire.codec import Decoder
from services.wire.errors import Broken
from services.wire.periods import Calendar
from services.wire.pgarrays import EPOCH_US, MINUS_INFINITY
from services.wire.usage import FUTURE_TOLERANCE_US
from tests.records import ARRIVAL_US, DAY_US, HOUR_US, UNIT, Raw, chunk_of, configuration, encoded, meter, v3
from upcasters.chain import upcasters

PREPARER = Preparer(Decoder(), upcasters())
NEVER = MINUS_INFINITY + EPOCH_US  # what a new item's watermark, -infinity, reads as
LATENESS = 2 * DAY_US
W = ARRIVAL_US - HOUR_US
#: As long as keys are kept by default, less what an event may be ahead.
KEY_AGE = 35 * DAY_US - FUTURE_TOLERANCE_US


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


def test_where_keys_are_kept_for_less_an_older_event_is_too_late_however_high_the_watermark() -> None:
    for age, expected in ((DAY_US, Arrival.ON_TIME), (DAY_US + 1, Arrival.TOO_LATE)):
        assert classify(ARRIVAL_US - age, NEVER, 35 * DAY_US, ARRIVAL_US, DAY_US) is expected


class InMemory:
    """What PostgreSQL keeps between chunks, as far as outcomes depend on it."""

    def __init__(self, config: Configuration, key_age_us: int = KEY_AGE) -> None:
        self._config = config
        self._key_age_us = key_age_us
        self._seen: dict[bytes, FirstSeen] = {}
        self._next_offset = 0
        self.watermarks: dict[bytes, int] = {}
        self.sums: dict[tuple[bytes, int, int], int] = defaultdict(int)
        self.outcomes: dict[str, int] = dict.fromkeys(OUTCOMES, 0)
        self.resends: list[bool] = []

    def feed(self, records: list[dict[str, Any]]) -> None:
        """One chunk."""
        raws = [Raw(self._next_offset + index, encoded(record)) for index, record in enumerate(records)]
        self._next_offset += len(raws)
        prepared = PREPARER.prepare(chunk_of(raws), self._config)
        for item in prepared.items.values():
            item.watermark = self.watermarks.get(item.item_id, NEVER)
            item.calendar = Calendar.parse(item.meter.calendar)
        known = {event[1]: self._seen[event[1]] for event in prepared.events if event[1] in self._seen}
        decisions = decide(prepared, known, self._key_age_us)
        self.resends += [one.resend for one in decisions.too_late]
        for index, event_id, digest, *_ in prepared.events:
            self._seen.setdefault(event_id, FirstSeen(digest, 3, 0, raws[index].offset))
        for item in prepared.items.values():
            assert item.watermark >= self.watermarks.get(item.item_id, NEVER), "the watermark went back"
            self.watermarks[item.item_id] = item.watermark
            for (hour, period), bucket in item.buckets.items():
                self.sums[item.item_id, hour, period] += bucket.total
        for account in prepared.accounts.values():
            for outcome in OUTCOMES:
                self.outcomes[outcome] += getattr(account, outcome)
        assert not prepared.parked
        assert sum(self.outcomes.values()) == self._next_offset


CONFIG = configuration(meter(calendar="1 month Asia/Kathmandu"))

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


def test_what_is_older_than_keys_are_kept_may_be_a_resend_and_says_so() -> None:
    store = InMemory(configuration(meter(lateness_us=35 * DAY_US)), key_age_us=3 * DAY_US)
    store.feed([ago(3 * 24, "a", 1), ago(3 * 24 + 1, "b", 1)])
    assert store.outcomes["counted"] == store.outcomes["adjusted"] == 1
    assert store.resends == [True]


def test_what_is_too_late_for_the_window_only_cannot_be_a_resend() -> None:
    store = InMemory(CONFIG)
    store.feed([ago(0, "a", 1), ago(9 * 24, "b", 1)])
    assert store.resends == [False]


# -- One hour of an item ---------------------------------------------------------------------------------


def item_of(aggregation: str, calendar: str = "1 month UTC") -> Item:
    item = Item(b"i" * 16, "cust-1", meter(aggregation=aggregation, calendar=calendar), Account())
    item.calendar = Calendar.parse(calendar)
    return item


#: (microseconds into one of three hours, amount, key, whether it is late)
additions = st.lists(
    st.tuples(
        st.sampled_from([0, 1, HOUR_US - 1, HOUR_US, HOUR_US + 7, 2 * HOUR_US]),
        st.integers(0, 9),
        st.text("ab\u00e9\U0001f600", min_size=1, max_size=3),
        st.integers(0, 1),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda one: one[2],
)
AGGREGATES = {
    "sum": lambda inside: sum(one[1] for one in inside),
    "count": lambda inside: sum(one[1] for one in inside),
    "max": lambda inside: max(one[1] for one in inside),
    "last": lambda inside: max(inside, key=lambda one: (one[0], one[2]))[1],
    "unique": lambda inside: {one[1] for one in inside},
}


@given(additions, st.sampled_from(sorted(AGGREGATES)), st.data())
@settings(max_examples=300, deadline=None)
def test_an_hour_is_its_own_aggregate_whatever_order_its_events_came_in(
    several: list[tuple[int, int, str, int]], aggregation: str, data: st.DataObject
) -> None:
    item = item_of(aggregation)
    for at, amount, key, late in data.draw(st.permutations(several)):
        add(item, ARRIVAL_US + at, amount, key, late)
    hours = {(ARRIVAL_US + at) // HOUR_US * HOUR_US for at, *_ in several}
    assert {hour for hour, _ in item.buckets} == hours
    for (hour, _), bucket in item.buckets.items():
        inside = [one for one in several if (ARRIVAL_US + one[0]) // HOUR_US * HOUR_US == hour]
        found = bucket.values if aggregation == "unique" else bucket.total
        assert found == AGGREGATES[aggregation](inside)
        assert (bucket.events, bucket.late) == (len(inside), sum(one[3] for one in inside))
        assert bucket.first_us == ARRIVAL_US + min(one[0] for one in inside)
        assert bucket.last_us == ARRIVAL_US + max(one[0] for one in inside)


@given(st.lists(st.text(min_size=1, max_size=3), min_size=2, max_size=6, unique=True), st.data())
@settings(max_examples=200, deadline=None)
def test_of_events_at_one_time_the_last_is_that_of_the_greatest_key_by_code_points(
    keys: list[str], data: st.DataObject
) -> None:
    item = item_of("last")
    for key in data.draw(st.permutations(keys)):
        add(item, ARRIVAL_US, 1 + keys.index(key), key, 0)
    (bucket,) = item.buckets.values()
    assert bucket.key == max(keys, key=lambda key: key.encode("utf-32-be"))
    assert bucket.total == 1 + keys.index(bucket.key)


def test_a_last_value_of_zero_replaces_an_earlier_one_and_a_first_value_counts_whatever_it_is() -> None:
    item = item_of("last")
    add(item, ARRIVAL_US, -3, "a", 0)
    assert [bucket.total for bucket in item.buckets.values()] == [-3]
    add(item, ARRIVAL_US + 1, 0, "b", 0)
    assert [bucket.total for bucket in item.buckets.values()] == [0]


@given(st.integers(0, 40 * DAY_US), st.integers(0, 40 * DAY_US))
@settings(max_examples=200, deadline=None)
def test_two_moments_share_a_bucket_when_they_share_hour_and_period(first: int, second: int) -> None:
    item = item_of("sum", "1 week Asia/Kathmandu 2026-02-28T18:15:00Z")
    assume(first != second)
    assert item.calendar is not None
    for number, at in enumerate((first, second, first)):
        add(item, ARRIVAL_US + at, UNIT, f"evt-{number}", 0)
    places = [
        ((ARRIVAL_US + at) // HOUR_US * HOUR_US, item.calendar.period_start(ARRIVAL_US + at))
        for at in (first, second)
    ]
    assert set(item.buckets) == set(places)
    assert sum(bucket.events for bucket in item.buckets.values()) == 3


def test_no_event_is_counted_before_the_items_periods_are_known() -> None:
    item = Item(b"i" * 16, "cust-1", meter(), Account())
    with pytest.raises(Broken):
        add(item, ARRIVAL_US, 1, "a", 0)
