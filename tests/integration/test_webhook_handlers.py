"""What the product does with Stripe's snapshot events, in a real PostgreSQL.

``Engine`` keeps the contract of the dispatch engine and no more: ``fetch`` outside, ``apply`` and the outbox
in one transaction. Events are written out after the shapes of stripe-python 16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.streaming.outbox import enqueue
from services.webhooks.handlers import product_handlers
from services.webhooks.handling import Handler, Refused, WebhookEvent
from tests.oracle import unframe

Object = dict[str, Any]
T0 = datetime(2026, 6, 1, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def fail_nothing(*_: Any, **__: Any) -> list[str]:
    return []


HANDLERS: dict[str, Handler] = {
    event_type: handler for handler in product_handlers(fail_nothing) for event_type in handler.types
}


class Engine:
    def __init__(self, db: psycopg.Connection[Any]) -> None:
        self.db = db
        self.number = 0

    def event(self, event_type: str, data: Mapping[str, Any], **fields: Any) -> WebhookEvent:
        """The next event, a minute after the one before."""
        self.number += 1
        given: dict[str, Any] = {
            "event_id": f"evt_{self.number}",
            "endpoint": "main",
            "account": "",
            "object_id": str(data.get("id", "")),
            "is_thin": False,
            "livemode": False,
            "created_at": T0 + self.number * MINUTE,
            "previous": {},
        }
        return WebhookEvent(event_type=event_type, data=data, **(given | fields))

    def handle(self, event: WebhookEvent) -> list[Object]:
        """The ops events of one run."""
        with self.db.transaction():
            rows = HANDLERS[event.event_type].apply(self.db, event, None, event.created_at)
            enqueue(self.db, "tidemeter-dispatcher", list(rows))
        return [unframe("ops_event", 1, row.value) for row in rows]

    def tell(self, event_type: str, data: Mapping[str, Any], **fields: Any) -> list[Object]:
        return self.handle(self.event(event_type, data, **fields))

    def sql(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        return self.db.execute(statement, values).fetchall()  # type: ignore[call-overload]

    def calendar(self, ref: str = "ada") -> str | None:
        return self.sql("SELECT calendar FROM customers WHERE customer_ref = %s", ref)[0][0]  # type: ignore[no-any-return]


@pytest.fixture
def engine(postgres_dsn: str) -> Iterator[Engine]:
    with psycopg.connect(postgres_dsn, autocommit=True) as db:
        db.execute("INSERT INTO tenants (tenant_id) VALUES ('acme')")
        yield Engine(db)


def seconds(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


def named(events: list[Object]) -> list[str]:
    return [event["name"] for event in events]


def customer(**fields: Any) -> Object:
    return {"id": "cus_1", "object": "customer", "email": "a@b.example", "metadata": {}, **fields}


def of_ada(**metadata: str) -> Object:
    return customer(metadata={"tidemeter_tenant": "acme", "tidemeter_ref": "ada", **metadata})


def item(usage_type: str = "metered", interval: str = "month", count: int = 1) -> Object:
    recurring = {"usage_type": usage_type, "interval": interval, "interval_count": count, "meter": "mtr_1"}
    return {"id": "si_1", "object": "subscription_item", "price": {"id": "price_1", "recurring": recurring}}


def subscription(
    subscription_id: str = "sub_1",
    status: str = "active",
    *,
    items: list[Object] | None = None,
    anchor: str = "2026-01-31T13:37:42",
    created: str = "2026-01-31T13:37:42",
    **fields: Any,
) -> Object:
    return {
        "id": subscription_id,
        "object": "subscription",
        "customer": "cus_1",
        "status": status,
        "created": seconds(created),
        "billing_cycle_anchor": seconds(anchor),
        "billing_cycle_anchor_config": None,
        "cancellation_details": {"comment": None, "feedback": None, "reason": None},
        "items": {"object": "list", "data": [item()] if items is None else items, "has_more": False},
        **fields,
    }


def invoice(status: str = "draft", **fields: Any) -> Object:
    return {
        "id": "in_1",
        "object": "invoice",
        "customer": "cus_1",
        "status": status,
        "billing_reason": "subscription_cycle",
        "collection_method": "charge_automatically",
        "attempted": True,
        "next_payment_attempt": None,
        "amount_remaining": 1250,
        "currency": "eur",
        "period_start": seconds("2026-05-15T13:37:42"),
        "period_end": seconds("2026-06-15T13:37:42"),
        "automatically_finalizes_at": None,
        "status_transitions": {"finalized_at": None, "paid_at": None, "voided_at": None},
        "parent": {
            "type": "subscription_details",
            "subscription_details": {"subscription": "sub_1", "metadata": {}},
        },
        **fields,
    }


def charge(**fields: Any) -> Object:
    return {
        "id": "ch_1",
        "object": "charge",
        "customer": "cus_1",
        "amount": 2000,
        "amount_captured": 2000,
        "amount_refunded": 0,
        "captured": True,
        "status": "succeeded",
        "currency": "eur",
        "created": seconds("2026-06-01T10:00:00"),
        "balance_transaction": None,
        "failure_code": None,
        **fields,
    }


# Every handler ------------------------------------------------------------------------------------------


def test_no_type_has_two_handlers() -> None:
    types = [event_type for handler in product_handlers(fail_nothing) for event_type in handler.types]
    assert len(types) == len(set(types)) == len(HANDLERS)


SAMPLES: dict[str, Object] = {
    "customer.": of_ada(tidemeter_timezone="Europe/Budapest"),
    "customer.subscription.": subscription(status="unpaid"),
    "invoice.": invoice("open"),
    "charge.": charge(amount_refunded=500, failure_code="card_declined"),
    "charge.dispute.": {
        "id": "du_1",
        "charge": "ch_1",
        "amount": 7,
        "currency": "eur",
        "status": "lost",
        "reason": "fraudulent",
    },
    "charge.refund.": {
        "id": "re_1",
        "charge": "ch_1",
        "amount": 7,
        "currency": "eur",
        "status": "succeeded",
        "created": seconds("2026-06-01T10:00:00"),
        "balance_transaction": "txn_1",
    },
    "payout.": {"id": "po_1", "amount": 900, "currency": "eur", "failure_code": "account_closed"},
    "account.": {"id": "ca_1", "object": "application"},
    "payment_method.": {
        "id": "pm_1",
        "type": "card",
        "customer": "cus_1",
        "card": {"exp_month": 12, "exp_year": 2027, "last4": "4242"},
    },
}
SAMPLES["refund."] = SAMPLES["charge.refund."]
SNAPSHOT_TYPES = sorted(event_type for event_type in HANDLERS if not event_type.startswith("v1."))
TABLES = (
    *("customers", "stripe_customers", "stripe_subscriptions", "stripe_invoices", "stripe_fees"),
    "stripe_cards",
)


def sample(event_type: str) -> Object:
    return SAMPLES[max((prefix for prefix in SAMPLES if event_type.startswith(prefix)), key=len)]


def state(engine: Engine) -> list[list[tuple[Any, ...]]]:
    return [engine.sql(f"SELECT to_jsonb(t) FROM {name} t ORDER BY 1") for name in TABLES]


def event_of(engine: Engine, event_type: str) -> WebhookEvent:
    account = "acct_1" if event_type.startswith("account.") else ""
    previous = {"amount_refunded": 0, "status": "active"}
    return engine.event(event_type, sample(event_type), account=account, previous=previous)


def test_an_event_that_is_applied_again_changes_nothing_and_tells_nothing_new(engine: Engine) -> None:
    for event_type in SNAPSHOT_TYPES:
        event = event_of(engine, event_type)
        with engine.db.transaction(force_rollback=True):
            first, after_first = engine.handle(event), state(engine)
            again, after_again = engine.handle(event), state(engine)
            assert after_again == after_first, event_type
            assert {one["ops_event_id"] for one in again} <= {one["ops_event_id"] for one in first}


def test_a_run_that_is_rolled_back_leaves_nothing_and_its_repetition_everything(engine: Engine) -> None:
    for event_type in SNAPSHOT_TYPES:
        event, before = event_of(engine, event_type), state(engine)
        with engine.db.transaction(force_rollback=True):
            lost = engine.handle(event)
        assert state(engine) == before, event_type
        with engine.db.transaction(force_rollback=True):
            assert engine.handle(event) == lost


def test_no_ops_event_holds_personal_data_or_an_address(engine: Engine) -> None:
    secrets = {"email": "ada@lovelace.example", "name": "Ada", "receipt_url": "https://pay.example/x"}
    for event_type in SNAPSHOT_TYPES:
        told = engine.tell(
            event_type, sample(event_type) | secrets, account="acct_1", previous={"amount_refunded": 0}
        )
        for event in told:
            assert not any(secret in repr(event) for secret in secrets.values())


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["cus_1", "active"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def damaged(draw: st.DrawFn, whole: Any) -> Any:
    """A sample some of whose parts are missing, or are something else."""
    if draw(st.integers(0, 7)) == 0:
        return draw(JSON)
    if isinstance(whole, dict):
        return {name: draw(damaged(part)) for name, part in whole.items() if draw(st.integers(0, 9))}
    if isinstance(whole, list):
        return [draw(damaged(part)) for part in whole]
    return whole


def test_whatever_an_object_holds_it_is_handled_or_refused(engine: Engine) -> None:
    @settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data(), event_type=st.sampled_from(SNAPSHOT_TYPES))
    def handled_or_refused(data: st.DataObject, event_type: str) -> None:
        about = data.draw(damaged(sample(event_type)))
        previous = data.draw(damaged({"amount_refunded": 0, "status": "active"}))
        event = engine.event(
            event_type,
            about if isinstance(about, dict) else {},
            previous=previous if isinstance(previous, dict) else {},
        )
        with engine.db.transaction(force_rollback=True):
            try:
                HANDLERS[event_type].apply(engine.db, event, None, event.created_at)
            except Refused as refused:
                assert refused.code.startswith("shape_")

    handled_or_refused()


# Customers ----------------------------------------------------------------------------------------------


def test_a_customer_is_mapped_by_the_metadata_that_apply_writes(engine: Engine) -> None:
    assert engine.tell("customer.created", of_ada()) == []
    assert engine.sql("SELECT tenant_id, customer_ref, stripe_customer, calendar FROM customers") == [
        ("acme", "ada", "cus_1", None)
    ]


def test_a_mapping_that_exists_stays_whatever_a_webhook_says(engine: Engine) -> None:
    engine.db.execute("INSERT INTO customers VALUES ('acme', 'ada', 'cus_operators')")
    engine.tell("customer.updated", of_ada())
    assert engine.sql("SELECT stripe_customer FROM customers") == [("cus_operators",)]


@pytest.mark.parametrize(
    "metadata",
    [
        {"tidemeter_tenant": "nobody", "tidemeter_ref": "ada"},
        {"tidemeter_tenant": "acme"},
        {"tidemeter_tenant": "acme", "tidemeter_ref": "a\x00b"},
        {"tidemeter_tenant": "acme", "tidemeter_ref": "a" * 256},
    ],
)
def test_metadata_that_names_nobody_maps_nobody(engine: Engine, metadata: Object) -> None:
    engine.tell("customer.created", customer(metadata=metadata))
    assert engine.sql("SELECT * FROM customers") == []
    assert len(engine.sql("SELECT * FROM stripe_customers")) == 1


def test_a_connected_account_maps_nobody_and_moves_no_periods(engine: Engine) -> None:
    engine.tell("customer.created", of_ada(), account="acct_1")
    assert engine.sql("SELECT * FROM customers") == []
    engine.tell("customer.created", of_ada())
    engine.tell("customer.subscription.created", subscription(), account="acct_1")
    assert engine.calendar() is None


def test_a_time_zone_that_does_not_exist_is_ignored_and_one_that_is_taken_away_is_gone(
    engine: Engine,
) -> None:
    def zone() -> str | None:
        return engine.sql("SELECT timezone FROM stripe_customers")[0][0]  # type: ignore[no-any-return]

    for name, expected in [
        ("Asia/Kathmandu", "Asia/Kathmandu"),
        ("Asia/Nowhere", "Asia/Kathmandu"),
        ("../etc", "Asia/Kathmandu"),
        ("", None),
    ]:
        engine.tell("customer.updated", of_ada(tidemeter_timezone=name))
        assert zone() == expected


def test_a_deleted_customer_is_told_of_once_and_its_cards_are_forgotten(engine: Engine) -> None:
    engine.tell("customer.created", of_ada())
    engine.tell("payment_method.attached", SAMPLES["payment_method."])
    event = engine.event("customer.deleted", of_ada())
    [told] = engine.handle(event)
    assert (told["name"], told["subject_id"]) == ("stripe_customer_deleted", "cus_1")
    assert told["attributes"] == {"customer_id": "cus_1", "mapped": "1"}
    assert engine.sql("SELECT deleted_at FROM stripe_customers") == [(event.created_at,)]
    assert engine.sql("SELECT * FROM stripe_cards") == []


# Subscriptions and billing periods ----------------------------------------------------------------------

MONTHS = "1 month UTC 2026-01-31T13:37:42Z"


def test_a_metered_subscription_gives_its_customers_their_billing_periods(engine: Engine) -> None:
    engine.tell("customer.created", of_ada())
    engine.db.execute("INSERT INTO customers VALUES ('acme', 'bob', 'cus_1'), ('acme', 'eve', 'cus_2')")
    engine.tell("customer.subscription.created", subscription())
    assert [engine.calendar(ref) for ref in ("ada", "bob", "eve")] == [MONTHS, MONTHS, None]
    assert engine.sql("SELECT count(*) FROM calendar_changes") == [(2,)]
    engine.tell("customer.subscription.updated", subscription())
    assert engine.sql("SELECT count(*) FROM calendar_changes") == [(2,)], "nothing changed"


def test_a_mapping_that_comes_after_the_subscription_gets_its_periods_too(engine: Engine) -> None:
    engine.tell("customer.subscription.created", subscription())
    engine.tell("customer.updated", of_ada())
    assert engine.calendar() == MONTHS


def test_periods_follow_the_customers_time_zone(engine: Engine) -> None:
    engine.tell("customer.created", of_ada(tidemeter_timezone="Europe/Budapest"))
    engine.tell("customer.subscription.created", subscription(items=[item(interval="week", count=2)]))
    assert engine.calendar() == "2 week Europe/Budapest 2026-01-31T13:37:42Z"
    engine.tell("customer.updated", of_ada())
    assert engine.calendar() == "2 week UTC 2026-01-31T13:37:42Z"


@pytest.mark.parametrize(
    ("items", "fields"),
    [
        ([item("licensed")], {}),
        ([], {}),
        ([item(interval="fortnight")], {}),
        ([item(count=400)], {}),
        ([item()], {"status": "incomplete"}),
        ([item()], {"status": "paused"}),
        ([item()], {"status": "canceled"}),
    ],
)
def test_what_is_not_metered_or_not_live_or_no_cycle_says_nothing_of_periods(
    engine: Engine, items: list[Object], fields: Object
) -> None:
    engine.tell("customer.created", of_ada())
    engine.tell("customer.subscription.created", subscription(items=items, **fields))
    assert engine.calendar() is None


def test_the_metered_price_decides_among_several_and_the_older_shape_is_read(engine: Engine) -> None:
    engine.tell("customer.created", of_ada())
    old = {"id": "si_2", "plan": {"usage_type": "metered", "interval": "week", "interval_count": 1}}
    engine.tell("customer.subscription.created", subscription(items=[item("licensed", "year"), old]))
    assert engine.calendar() == "1 week UTC 2026-01-31T13:37:42Z"


def test_without_a_live_subscription_the_calendar_stays_as_it_is(engine: Engine) -> None:
    engine.tell("customer.created", of_ada())
    engine.tell("customer.subscription.created", subscription())
    engine.tell("customer.subscription.deleted", subscription(status="canceled"))
    assert engine.calendar() == MONTHS


def test_of_two_cycles_the_oldest_subscriptions_counts_and_that_is_told_once(engine: Engine) -> None:
    engine.tell("customer.created", of_ada())
    young = subscription("sub_2", anchor="2026-03-10T00:00:00", created="2026-03-10T00:00:00")
    assert engine.tell("customer.subscription.created", young) == []
    assert engine.calendar() == "1 month UTC 2026-03-10T00:00:00Z"
    [told] = engine.tell("customer.subscription.created", subscription())
    assert (told["name"], told["subject_type"]) == ("billing_period_unclear", "stripe_customer")
    assert told["attributes"] == {"customer_id": "cus_1", "subscription_id": "sub_1", "differing": "1"}
    assert engine.calendar() == MONTHS
    assert engine.tell("customer.subscription.updated", young) == []
    assert engine.tell("customer.subscription.deleted", subscription(status="canceled")) == []
    assert engine.calendar() == "1 month UTC 2026-03-10T00:00:00Z"


def test_cycles_whose_edges_are_the_same_are_clear(engine: Engine) -> None:
    engine.tell("customer.subscription.created", subscription(anchor="2026-01-15T10:00:00"))
    other = subscription("sub_2", anchor="2026-04-15T10:00:00", created="2026-04-15T10:00:00")
    assert engine.tell("customer.subscription.created", other) == []
    last_day = subscription("sub_3", anchor="2026-04-30T10:00:00", created="2026-04-30T10:00:00")
    assert named(engine.tell("customer.subscription.created", last_day)) == ["billing_period_unclear"]


def test_a_subscription_whose_metered_prices_differ_is_unclear(engine: Engine) -> None:
    mixed = subscription(items=[item(), item(interval="year")])
    assert named(engine.tell("customer.subscription.created", mixed)) == ["billing_period_unclear"]
    assert engine.tell("customer.subscription.updated", mixed) == []


@pytest.mark.parametrize(
    ("anchor", "interval", "count", "day", "expected"),
    [
        ("2026-02-28T10:00:00", "month", 1, 31, "1 month UTC 2026-01-31T10:00:00Z"),
        ("2026-02-28T10:00:00", "month", 1, 28, "1 month UTC 2026-02-28T10:00:00Z"),
        ("2026-04-30T10:00:00", "month", 3, 31, "3 month UTC 2026-01-31T10:00:00Z"),
        ("2026-02-28T10:00:00", "year", 1, 29, "1 year UTC 2024-02-29T10:00:00Z"),
        ("2026-02-28T10:00:00", "year", 1, 31, "1 year UTC 2026-02-28T10:00:00Z"),
        ("2026-02-28T10:00:00", "week", 1, 31, "1 week UTC 2026-02-28T10:00:00Z"),
    ],
)
def test_a_cycle_on_the_31st_that_began_in_a_shorter_month_comes_back_to_the_31st(
    engine: Engine, anchor: str, interval: str, count: int, day: int, expected: str
) -> None:
    engine.tell("customer.created", of_ada())
    engine.tell(
        "customer.subscription.created",
        subscription(
            anchor=anchor,
            items=[item(interval=interval, count=count)],
            billing_cycle_anchor_config={"day_of_month": day, "hour": None},
        ),
    )
    assert engine.calendar() == expected


def test_an_incomplete_subscription_that_expires_is_told_of_once(engine: Engine) -> None:
    engine.tell("customer.subscription.created", subscription(status="incomplete"))
    expired = subscription(status="incomplete_expired")
    [told] = engine.tell("customer.subscription.updated", expired)
    assert (told["name"], told["subject_id"]) == ("incomplete_expired", "sub_1")
    assert engine.tell("customer.subscription.updated", expired) == []


@pytest.mark.parametrize(
    ("status", "reason", "event_type"),
    [
        ("unpaid", None, "customer.subscription.updated"),
        ("canceled", "payment_failed", "customer.subscription.deleted"),
    ],
)
def test_dunning_that_is_exhausted_is_told_once_until_it_is_paid_again(
    engine: Engine, status: str, reason: str | None, event_type: str
) -> None:
    details = {"reason": reason}
    ended = subscription(status=status, cancellation_details=details)
    ids = set()
    for _ in range(2):
        engine.tell("customer.subscription.updated", subscription(status="past_due"))
        [told] = engine.tell(event_type, ended)
        assert told["name"] == "dunning_exhaustion"
        assert told["attributes"] == {
            "subscription_id": "sub_1",
            "from_status": "past_due",
            "to_status": status,
            "source": "stripe_native",
        }
        ids.add(told["ops_event_id"])
        assert engine.tell("customer.subscription.updated", ended) == []
        engine.tell("customer.subscription.updated", subscription())
        assert engine.sql("SELECT exhausted_at, past_due_since FROM stripe_subscriptions") == [(None, None)]
    assert len(ids) == 2


def test_a_subscription_that_a_customer_cancelled_is_no_exhaustion(engine: Engine) -> None:
    details = {"reason": "cancellation_requested"}
    ended = subscription(status="canceled", cancellation_details=details)
    assert engine.tell("customer.subscription.deleted", ended) == []


def test_how_long_a_subscription_is_past_due_is_kept(engine: Engine) -> None:
    first = engine.event("customer.subscription.updated", subscription(status="past_due"))
    engine.handle(first)
    engine.tell("customer.subscription.updated", subscription(status="past_due"))
    assert engine.sql("SELECT past_due_since FROM stripe_subscriptions") == [(first.created_at,)]


# Invoices -----------------------------------------------------------------------------------------------


def test_an_invoice_is_kept_with_its_period_and_when_it_is_final(engine: Engine) -> None:
    at = seconds("2026-06-16T13:37:42")
    engine.tell("invoice.created", invoice(automatically_finalizes_at=at))
    row = "SELECT subscription_id, status, is_cycle, finalizes_at, finalized_at FROM stripe_invoices"
    assert engine.sql(row) == [("sub_1", "draft", True, datetime.fromtimestamp(at, UTC), None)]
    engine.tell("invoice.finalized", invoice("open", status_transitions={"finalized_at": at}))
    engine.tell("invoice.paid", invoice("paid", status_transitions=None))
    [(_, status, *_, finalized_at)] = engine.sql(row)
    assert status == "paid" and finalized_at is not None
    engine.tell("invoice.deleted", invoice())
    assert engine.sql(row) == []


def test_where_older_api_versions_name_the_subscription_is_read_too(engine: Engine) -> None:
    engine.tell("invoice.created", invoice(parent=None, subscription="sub_old"))
    assert engine.sql("SELECT subscription_id FROM stripe_invoices") == [("sub_old",)]


def test_an_uncollectible_invoice_is_lost_revenue_and_an_older_state_does_not_come_back(
    engine: Engine,
) -> None:
    late = engine.event("invoice.marked_uncollectible", invoice("uncollectible"))
    engine.tell("invoice.paid", invoice("paid"))
    [told] = engine.handle(late)
    assert (told["name"], told["subject_type"], told["subject_id"]) == ("revenue_loss", "invoice", "in_1")
    assert told["attributes"] == {
        "reason": "uncollectible",
        "invoice_id": "in_1",
        "customer_id": "cus_1",
        "amount": "1250",
        "amount_remaining": "1250",
        "currency": "eur",
    }
    assert engine.sql("SELECT status FROM stripe_invoices") == [("paid",)]


def test_a_failed_payment_without_a_next_attempt_exhausts_dunning_whatever_comes_first(
    engine: Engine,
) -> None:
    [told] = engine.tell("invoice.payment_failed", invoice("open"))
    assert told["name"] == "dunning_exhaustion"
    assert told["attributes"]["to_status"] == "past_due"
    assert engine.tell("customer.subscription.updated", subscription(status="past_due")) == []
    assert engine.tell("customer.subscription.updated", subscription(status="unpaid")) == []
    assert engine.tell("invoice.payment_failed", invoice("open")) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"next_payment_attempt": seconds("2026-06-20T00:00:00")},
        {"collection_method": "send_invoice"},
        {"billing_reason": "subscription_create"},
        {"parent": None},
        {"customer": None},
    ],
)
def test_other_failed_payments_do_not(engine: Engine, fields: Object) -> None:
    assert engine.tell("invoice.payment_failed", invoice("open", **fields)) == []


def test_a_failure_that_the_subscription_has_left_behind_is_no_exhaustion(engine: Engine) -> None:
    late = engine.event("invoice.payment_failed", invoice("open"))
    engine.tell("customer.subscription.updated", subscription())
    assert engine.handle(late) == []


# Charges ------------------------------------------------------------------------------------------------


def test_a_failed_charge_is_told_with_its_code(engine: Engine) -> None:
    [told] = engine.tell("charge.failed", charge(status="failed", failure_code="Card Declined!"))
    assert told["attributes"] == {
        "charge_id": "ch_1",
        "customer_id": "cus_1",
        "failure_code": "card_declined_",
        "amount": "2000",
        "currency": "eur",
    }


def test_each_refund_loses_what_it_adds_and_no_more(engine: Engine) -> None:
    lost = []
    for refunded, before in [(500, 0), (2000, 500)]:
        previous = {"amount_refunded": before}
        lost += engine.tell("charge.refunded", charge(amount_refunded=refunded), previous=previous)
    assert [one["attributes"]["amount"] for one in lost] == ["500", "1500"]
    assert {one["attributes"]["reason"] for one in lost} == {"refund"}
    assert len({one["ops_event_id"] for one in lost}) == 2


def test_a_refund_that_does_not_say_what_was_refunded_before_is_refused(engine: Engine) -> None:
    with pytest.raises(Refused, match="shape_previous_amount_refunded"):
        engine.tell("charge.refunded", charge(amount_refunded=5))


def test_a_charge_waits_for_its_fee_from_its_capture_on(engine: Engine) -> None:
    row = "SELECT kind, charge_id, amount, currency, balance_transaction, state FROM stripe_fees"
    engine.tell("charge.succeeded", charge(captured=False, amount_captured=0))
    engine.tell("charge.updated", charge(status="failed"))
    assert engine.sql(row) == []
    engine.tell("charge.captured", charge(amount_captured=1500))
    assert engine.sql(row) == [("charge", "ch_1", 1500, "eur", None, "pending")]
    [(due,)] = engine.sql("SELECT next_attempt_at FROM stripe_fees")
    engine.tell("charge.updated", charge(amount_captured=1500, balance_transaction={"id": "txn_1"}))
    engine.tell("charge.updated", charge(amount_captured=1500))
    assert engine.sql(row) == [("charge", "ch_1", 1500, "eur", "txn_1", "pending")]
    assert engine.sql("SELECT next_attempt_at > %s FROM stripe_fees", due) == [(True,)]


def test_a_fee_that_is_settled_stays_settled(engine: Engine) -> None:
    engine.tell("charge.succeeded", charge())
    engine.db.execute("UPDATE stripe_fees SET state = 'matched', settled_at = now()")
    engine.tell("charge.updated", charge(balance_transaction="txn_9"))
    assert engine.sql("SELECT state, balance_transaction FROM stripe_fees") == [("matched", None)]


@pytest.mark.parametrize("end", ["failed", "canceled"])
def test_a_refund_waits_for_its_fee_unless_it_comes_to_nothing(engine: Engine, end: str) -> None:
    refund = SAMPLES["refund."]
    engine.tell("refund.created", refund)
    assert engine.sql("SELECT kind, charge_id, balance_transaction FROM stripe_fees") == [
        ("refund", "ch_1", "txn_1")
    ]
    assert engine.tell("refund.failed", refund | {"status": end}) == []
    assert engine.sql("SELECT * FROM stripe_fees") == []


def test_a_dispute_is_told_and_loses_revenue_only_when_it_is_lost(engine: Engine) -> None:
    dispute = SAMPLES["charge.dispute."]
    [told] = engine.tell("charge.dispute.created", dispute | {"status": "needs_response"})
    assert (told["name"], told["attributes"]["reason"]) == ("charge_disputed", "fraudulent")
    assert engine.tell("charge.dispute.closed", dispute | {"status": "won"}) == []
    [told] = engine.tell("charge.dispute.closed", dispute)
    assert (told["name"], told["attributes"]["reason"]) == ("revenue_loss", "dispute_lost")
    assert told["attributes"]["amount"] == "7"


# Connect, payouts, cards --------------------------------------------------------------------------------


def test_an_account_that_leaves_is_told_of_each_time(engine: Engine) -> None:
    told = [
        event
        for _ in range(2)
        for event in engine.tell("account.application.deauthorized", SAMPLES["account."], account="acct_1")
    ]
    assert named(told) == ["connect_account_deauthorized"] * 2
    assert {event["attributes"]["account_id"] for event in told} == {"acct_1"}
    assert len({event["ops_event_id"] for event in told}) == 2
    with pytest.raises(Refused, match="shape_account"):
        engine.tell("account.application.deauthorized", SAMPLES["account."])


@pytest.mark.parametrize(("account", "name"), [("", "payout_failed"), ("acct_1", "connect_payout_failed")])
def test_a_failed_payout_is_told_as_ours_or_theirs(engine: Engine, account: str, name: str) -> None:
    [told] = engine.tell("payout.failed", SAMPLES["payout."], account=account)
    assert told["name"] == name
    assert told["attributes"] == {
        "payout_id": "po_1",
        "amount": "900",
        "currency": "eur",
        "failure_code": "account_closed",
        **({"account": account} if account else {}),
    }


def test_a_card_is_kept_until_it_is_detached(engine: Engine) -> None:
    card = SAMPLES["payment_method."]
    engine.tell("payment_method.attached", card)
    assert engine.sql("SELECT stripe_customer, expires_on FROM stripe_cards") == [("cus_1", date(2028, 1, 1))]
    engine.db.execute("UPDATE stripe_cards SET told_for = expires_on")
    renewed = card | {"card": {"exp_month": 5, "exp_year": 2030}}
    engine.tell("payment_method.automatically_updated", renewed)
    assert engine.sql("SELECT expires_on, told_for FROM stripe_cards") == [
        (date(2030, 6, 1), date(2028, 1, 1))
    ]
    engine.tell("payment_method.attached", {"id": "pm_2", "type": "sepa_debit", "customer": "cus_1"})
    engine.tell("payment_method.detached", renewed | {"customer": None})
    assert engine.sql("SELECT * FROM stripe_cards") == []


def test_metadata_maps_no_customer_that_is_billed_as_itself_to_another(engine: Engine) -> None:
    metadata = {"tidemeter_tenant": "acme", "tidemeter_ref": "cus_2"}
    engine.tell("customer.created", customer(metadata=metadata))
    assert engine.sql("SELECT * FROM customers") == []
    engine.tell("customer.created", customer(id="cus_2", metadata=metadata))
    assert engine.sql("SELECT customer_ref, stripe_customer FROM customers") == [("cus_2", "cus_2")]


def test_an_authorisation_that_is_let_go_of_is_no_loss(engine: Engine) -> None:
    released = charge(captured=False, amount_captured=0, amount_refunded=2000)
    assert engine.tell("charge.refunded", released, previous={"amount_refunded": 0}) == []


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize(
    ("first", "last", "status"),
    [("created", "updated", "active"), ("updated", "deleted", "canceled")],
)
def test_of_one_second_a_subscription_begins_with_its_creation_and_ends_with_its_end(
    engine: Engine, first: str, last: str, status: str, last_first: bool
) -> None:
    """Stripe tells whole seconds, so the order of their events is anyone's guess."""
    engine.tell("customer.created", of_ada())
    given = [
        (
            f"customer.subscription.{first}",
            subscription(status="incomplete" if first == "created" else "active"),
        ),
        (f"customer.subscription.{last}", subscription(status=status)),
    ]
    for event_type, data in reversed(given) if last_first else given:
        engine.tell(event_type, data, created_at=T0 + timedelta(days=1))
    assert engine.sql("SELECT status FROM stripe_subscriptions") == [(status,)]


def test_the_creation_of_a_customer_takes_no_time_zone_back_that_was_given_in_its_second(
    engine: Engine,
) -> None:
    moment = T0 + timedelta(days=1)
    engine.tell("customer.updated", of_ada(tidemeter_timezone="Europe/Berlin"), created_at=moment)
    engine.tell("customer.created", customer(), created_at=moment)
    assert engine.sql("SELECT timezone FROM stripe_customers") == [("Europe/Berlin",)]
