"""Event summaries: what is shown of the ledger, when, and in which buckets."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import stripe

from services.stripe_simulator import SimulatorConfig, SimulatorControl, running_simulator
from tests.contract.stripe_calls import AUTHORIZATION, DAY, HOUR, http, sdk

MIDNIGHT = 1_800_057_600  # 2027-01-16T00:00:00Z


@pytest.fixture
def sim(running: SimulatorControl) -> SimulatorControl:
    running.reset()
    return prepared(running)


def prepared(control: SimulatorControl) -> SimulatorControl:
    assert MIDNIGHT % DAY == 0
    control.set_clock(MIDNIGHT + DAY)
    control.seed(customers=["cus_1", "cus_2"], meters=["calls"])
    return control


def use(sim: SimulatorControl, at: int, value: str, event_name: str = "calls", identifier: str = "") -> None:
    form = {
        "event_name": event_name,
        "timestamp": str(MIDNIGHT + at),
        "payload[stripe_customer_id]": "cus_1",
        "payload[value]": value,
    }
    form |= {"identifier": identifier} if identifier else {}
    url = f"{sim.url}/v1/billing/meter_events"
    assert http.post(url, data=form, headers=AUTHORIZATION).status_code == 200


def ask(sim: SimulatorControl, start: int, end: int, meter: str = "calls", **params: Any) -> httpx.Response:
    query: dict[str, Any] = {
        "customer": "cus_1",
        "start_time": MIDNIGHT + start,
        "end_time": MIDNIGHT + end,
    } | params
    url = f"{sim.url}/v1/billing/meters/mtr_{meter}/event_summaries"
    return http.get(url, params=query, headers=AUTHORIZATION)


def shown(sim: SimulatorControl, start: int, end: int, **params: Any) -> list[tuple[int, float]]:
    """(start relative to midnight, value) of each summary, as answered."""
    response = ask(sim, start, end, **params)
    assert response.status_code == 200
    return [(one["start_time"] - MIDNIGHT, one["aggregated_value"]) for one in response.json()["data"]]


def test_a_range_holds_its_start_and_not_its_end(sim: SimulatorControl) -> None:
    for at, value in ((0, "1"), (HOUR - 1, "10"), (HOUR, "100")):
        use(sim, at, value)
    assert shown(sim, 0, HOUR) == [(0, 11)]
    assert shown(sim, HOUR, 2 * HOUR) == [(HOUR, 100)]


def test_hourly_buckets_come_newest_first_without_the_empty_ones(sim: SimulatorControl) -> None:
    for at, value in ((10, "1"), (5 * HOUR, "2"), (5 * HOUR + 9, "3")):
        use(sim, at, value)
    assert shown(sim, 0, DAY, value_grouping_window="hour") == [(5 * HOUR, 5), (0, 1)]
    assert shown(sim, 0, DAY, value_grouping_window="day") == [(0, 6)]


def test_a_customer_without_usage_has_no_summaries(sim: SimulatorControl) -> None:
    use(sim, 0, "1")
    assert shown(sim, 0, DAY, customer="cus_2") == []
    assert ask(sim, 0, DAY, customer="cus_9").json()["error"]["param"] == "customer"


@pytest.mark.parametrize(
    ("start", "end", "window"),
    [
        (1, DAY, None),
        (0, 90, None),
        (60, DAY, "hour"),
        (0, DAY - 60, "hour"),
        (HOUR, DAY, "day"),
        (60, 60, None),
    ],
)
def test_a_range_off_its_boundaries_is_refused(
    sim: SimulatorControl, start: int, end: int, window: str | None
) -> None:
    params = {"value_grouping_window": window} if window else {}
    assert ask(sim, start, end, **params).status_code == 400


def test_24_hours_need_three_pages_by_default_and_the_sdk_walks_them(sim: SimulatorControl) -> None:
    for hour in range(24):
        use(sim, hour * HOUR, str(hour + 1))
    first = ask(sim, 0, DAY, value_grouping_window="hour").json()
    assert (len(first["data"]), first["has_more"]) == (10, True)
    client = stripe.StripeClient("sk_test_x", base_addresses={"api": sim.url}, max_network_retries=0)
    listing = client.v1.billing.meters.event_summaries.list(
        "mtr_calls",
        {
            "customer": "cus_1",
            "start_time": MIDNIGHT,
            "end_time": MIDNIGHT + DAY,
            "value_grouping_window": "hour",
        },
    )
    assert [one.aggregated_value for one in listing.auto_paging_iter()] == list(range(24, 0, -1))
    assert sum(1 for one in sim.stats()["requests"] if "event_summaries" in one["route"]) == 1


def test_pages_go_backwards_and_refuse_what_is_out_of_range(sim: SimulatorControl) -> None:
    for hour in range(5):
        use(sim, hour * HOUR, "1")
    everything = ask(sim, 0, DAY, value_grouping_window="hour").json()["data"]
    before = ask(sim, 0, DAY, value_grouping_window="hour", limit=2, ending_before=everything[3]["id"]).json()
    assert (before["data"], before["has_more"]) == (everything[1:3], True)
    for params in ({"limit": 0}, {"limit": 101}, {"starting_after": "mtrusg_nope"}):
        assert ask(sim, 0, DAY, value_grouping_window="hour", **params).status_code == 400


def test_sum_count_and_last_aggregate_what_they_say(sim: SimulatorControl) -> None:
    sim.seed(
        meters=[
            {"id": f"mtr_{formula}", "event_name": formula, "default_aggregation": {"formula": formula}}
            for formula in ("sum", "count", "last")
        ]
    )
    for formula in ("sum", "count", "last"):
        for at, value in ((20, "0.1"), (30, "7"), (10, "-0.3")):
            use(sim, at, value, event_name=formula)
    assert shown(sim, 0, HOUR, meter="sum") == [(0, 6.8)]
    assert shown(sim, 0, HOUR, meter="count") == [(0, 3)]
    assert shown(sim, 0, HOUR, meter="last") == [(0, 7)]


def test_a_pre_aggregated_meter_counts_the_last_received_event_of_each_window(sim: SimulatorControl) -> None:
    sim.seed(meters=[{"id": "mtr_pre", "event_name": "pre", "event_time_window": "hour"}])
    for at, value in ((50, "100"), (10, "7"), (HOUR, "1")):
        use(sim, at, value, event_name="pre")
    assert shown(sim, 0, DAY, meter="pre") == [(0, 8)]


def test_the_value_is_a_json_number_a_double_while_the_ledger_stays_exact(sim: SimulatorControl) -> None:
    for value in ("999999999999999", "0.00000000000001"):
        use(sim, 0, value)
    assert b'"aggregated_value":999999999999999,' in ask(sim, 0, HOUR).content
    assert sim.total() == "999999999999999.00000000000001"


def test_a_negative_total_is_shown_as_negative(sim: SimulatorControl) -> None:
    use(sim, 0, "-2.5")
    assert shown(sim, 0, HOUR) == [(0, -2.5)]


def test_a_cancelled_event_leaves_the_summary(sim: SimulatorControl) -> None:
    use(sim, 0, "3", identifier="id-1")
    use(sim, 0, "4")
    form = {"type": "cancel", "event_name": "calls", "cancel[identifier]": "id-1"}
    http.post(f"{sim.url}/v1/billing/meter_event_adjustments", data=form, headers=AUTHORIZATION)
    assert shown(sim, 0, HOUR) == [(0, 4)]


def test_summaries_lag_and_a_later_event_may_show_first() -> None:
    with running_simulator(SimulatorConfig(port=0, summary_lag_seconds=1000, seed=3)) as sim:
        prepared(sim)
        for hour in range(12):
            use(sim, hour * HOUR, "1")
        sim.advance(400)
        assert shown(sim, 0, DAY) == [], "nothing shows before half the lag"
        sim.advance(600)
        visible = {start // HOUR for start, _ in shown(sim, 0, DAY, value_grouping_window="hour", limit=100)}
        assert 0 < len(visible) < 12
        assert visible != set(range(len(visible))), "they did not appear in the order of arrival"
        sim.advance(600)
        assert shown(sim, 0, DAY) == [(0, 12)]
        assert sim.total() == "12", "the ledger never lags"


def test_rule_16_summaries_can_be_stuck_for_hours(sim: SimulatorControl) -> None:
    use(sim, 0, "1", identifier="id-1")
    sim.stick_summaries(3 * HOUR)
    sim.advance(1)
    use(sim, 0, "2")
    sim.advance(2 * HOUR)
    form = {"type": "cancel", "event_name": "calls", "cancel[identifier]": "id-1"}
    http.post(f"{sim.url}/v1/billing/meter_event_adjustments", data=form, headers=AUTHORIZATION)
    assert shown(sim, 0, HOUR) == [(0, 1)], "neither the event nor the cancellation shows"
    sim.advance(HOUR)
    assert shown(sim, 0, HOUR) == [(0, 2)]


def test_rule_16_some_events_can_be_stuck_while_others_show() -> None:
    config = SimulatorConfig(port=0, summary_stuck_chance=0.5, summary_stuck_seconds=4 * HOUR, seed=3)
    with running_simulator(config) as sim:
        prepared(sim)
        for minute in range(20):
            use(sim, minute * 60, "1")
        ((_, early),) = shown(sim, 0, DAY)
        assert 0 < early < 20
        sim.advance(6 * HOUR)
        assert shown(sim, 0, DAY) == [(0, 20)]


def test_rule_15_a_cancellation_stays_pending_for_its_own_time() -> None:
    with running_simulator(SimulatorConfig(port=0, adjustment_lag_seconds=600)) as sim:
        prepared(sim)
        use(sim, 0, "3", identifier="id-1")
        client = sdk(sim)
        client.v1.billing.meter_event_adjustments.create(
            {"type": "cancel", "event_name": "calls", "cancel": {"identifier": "id-1"}}
        )
        assert shown(sim, 0, HOUR) == [(0, 3)]
        assert sim.stats()["cancellations"] == {"pending": 1, "complete": 0}
        sim.advance(901)
        assert shown(sim, 0, HOUR) == []
        assert sim.stats()["cancellations"] == {"pending": 0, "complete": 1}


def test_rule_19_a_pre_aggregated_meter_may_have_days_for_windows(sim: SimulatorControl) -> None:
    sim.seed(meters=[{"id": "mtr_day", "event_name": "day", "event_time_window": "day"}])
    for at, value in ((HOUR, "100"), (5 * HOUR, "7"), (HOUR, "40")):
        use(sim, at, value, event_name="day")
    assert shown(sim, 0, DAY, meter="day") == [(0, 40)], "the last received, not the latest"
