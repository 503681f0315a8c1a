"""Explanations beside one real worker: every number down to the offsets, and every record with its fate."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from confluent_kafka import Consumer, TopicPartition
from litestar import Litestar
from litestar.testing import TestClient
from typer.testing import CliRunner

from services.cli.common import ATTENTION, MISUSED
from services.cli.main import app as command
from services.console.routes import ROUTES
from services.ingest.app import openapi_document
from services.pusher import journal
from services.pusher.giving_back import GiveBack, Returned
from services.replay.customer_hours import RefusedQuestion
from services.replay.explaining import Explainer
from services.streaming.chunks import Partition
from services.streaming.explanation import Check, Explanation, Question
from services.streaming.parking import Choice, request_redrives
from services.wire.codec import Decoder
from services.wire.settings import load_settings
from tests.integration.console import console, key_header
from tests.integration.pushing import World, send_again
from tests.integration.pushing import until as until_async
from tests.oracle import DAY_S, HOUR_S, Usage, unframe
from tests.pipeline import Pipeline, Worker, until
from tests.records import Raw

#: A full hour ago, so that a test that runs over an edge asks for the hour that it filled.
HOUR = int(time.time()) // HOUR_S * HOUR_S - 2 * HOUR_S
AT = HOUR + 600
HOUR_TEXT = f"{datetime.fromtimestamp(HOUR + 1234, UTC):%Y-%m-%dT%H:%M:%SZ}"


@dataclass
class Scene:
    """One tenant with a meter of each aggregation, and questions about it."""

    pipeline: Pipeline
    tenant: str

    def usage(
        self, key: str, quantity: str | int = 1, at_s: float = AT, meter: str = "sum", **more: Any
    ) -> Usage:
        names = {"tenant": self.tenant, "customer": "cus_1", "meter": meter, **more}
        return Usage(quantity=Decimal(quantity), key=key, occurred_s=int(at_s), **names)

    def feed(self, *usages: Usage) -> list[tuple[str, int, int]]:
        places = self.pipeline.send(*usages)
        self.pipeline.await_quiet()
        return places

    def ask(self, meter: str = "sum", customer: str = "cus_1", **more: Any) -> Explanation:
        question = Question(
            **{"customer": customer, "meter": meter, "hour": HOUR_TEXT, "tenant_id": self.tenant, **more}
        )
        return explainer(self.pipeline).explain(question)

    def record(self) -> None:
        """What the pusher does with the deltas of this tenant, by its own code."""
        found = [Decoder().decode(one.value)[1] for one in self.pipeline.read("deltas.v1")]
        with self.pipeline.database() as db, db.transaction():
            journal.record_intents(db, [one for one in found if one["tenant_id"] == self.tenant])

    def set_intents(self, *states: str, code: str | None = None) -> None:
        """Take every intent of this tenant through these states."""
        with self.pipeline.database() as db:
            for state in states:
                db.execute(
                    "UPDATE meter_events SET state = %s, first_sent_at = CASE WHEN %s = 'pending' THEN NULL "
                    "ELSE coalesce(first_sent_at, now()) END, attempts = attempts + 1, error_code = %s, "
                    "request_id = 'req_1', http_status = 200 WHERE tenant_id = %s",
                    (state, state, code, self.tenant),
                )

    def report(self) -> None:
        """Close everything, and have it reported."""

        def closed() -> bool:
            self.pipeline.await_quiet()
            self.record()
            self.pipeline.push()
            return not self.pipeline.query(
                "SELECT 1 FROM buckets b JOIN items i USING (item_id) WHERE i.tenant_id = %s "
                "AND (b.open OR b.closed IS DISTINCT FROM b.total) LIMIT 1",
                self.tenant,
            )

        until(closed, "everything closed")
        self.pipeline.await_quiet()
        with self.pipeline.database() as db:
            db.execute(
                "UPDATE meter_events SET state = 'in_flight', first_sent_at = now(), attempts = 1 "
                "WHERE tenant_id = %s AND state = 'pending'",
                (self.tenant,),
            )
            db.execute(
                "UPDATE meter_events SET state = 'reported', settled_at = now(), http_status = 200, "
                "request_id = 'req_1' WHERE tenant_id = %s AND state IN ('in_flight', 'reported')",
                (self.tenant,),
            )

    def damage(self, change: str) -> None:
        with self.pipeline.database() as db:
            db.execute(
                "WITH held AS MATERIALIZED (SELECT item_id FROM items WHERE tenant_id = %s "
                f"ORDER BY item_id FOR UPDATE) UPDATE buckets b SET {change} FROM held i "
                "WHERE i.item_id = b.item_id",
                (self.tenant,),
            )


def explainer(pipeline: Pipeline) -> Explainer:
    return Explainer(load_settings(kafka_bootstrap=pipeline.kafka, postgres_dsn=pipeline.dsn))


@pytest.fixture
def scene(pipeline: Pipeline, worker: Worker) -> Scene:
    tenant = f"t{uuid.uuid4().hex[:8]}"
    pipeline.tenant(tenant)
    for aggregation in ("sum", "count", "max", "last"):
        pipeline.meter(tenant, aggregation, aggregation, lateness_s=2 * DAY_S)
    pipeline.meter(tenant, "unique", "unique", value_property="user", lateness_s=2 * DAY_S)
    pipeline.meter(tenant, "split", dimensions=("region",))
    return Scene(pipeline, tenant)


def checks(found: Explanation, about: str) -> list[Check]:
    return [one for one in found.checks if one.about == about]


def verdicts(found: Explanation) -> dict[str, str]:
    assert len(found.checks) == len({one.about for one in found.checks}), found.checks
    return {one.about: one.verdict for one in found.checks}


# The numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("meter", "total"),
    [("sum", "9"), ("count", "3"), ("max", "5"), ("last", "3"), ("unique", "2")],
)
def test_an_hour_of_each_aggregation_adds_up_to_its_bucket_and_to_what_was_reported(
    scene: Scene, meter: str, total: str
) -> None:
    scene.feed(
        *(
            scene.usage(f"k{place}", quantity, AT + place, meter, properties={"user": user, "secret": "s"})
            for place, (quantity, user) in enumerate([(1, "ada"), (5, "bob"), (3, "ada")])
        ),
        scene.usage("other-hour", 50, AT - HOUR_S * 3, "sum"),
        scene.usage("other-customer", 50, AT, meter, customer="cus_2", properties={"user": "eve"}),
    )
    scene.report()
    found = scene.ask(meter)
    assert [one.total for one in found.buckets] == [Decimal(total)]
    assert found.stripe.expected == Decimal(total)
    assert found.fates == {"counted": 3}
    assert [one.idempotency_key for one in sorted(found.events, key=lambda one: one.occurred_at)] == [
        *("k0", "k1", "k2")
    ]
    assert {one.value for one in found.events} == ({"ada", "bob"} if meter == "unique" else {None})
    assert set(verdicts(found).values()) == {"agree"}, found.checks
    assert found.agrees and found.records.complete and not found.truncated
    assert sum(one.amount for one in found.deltas) == sum(one.amount for one in found.intents)
    assert {one.request_id for one in found.intents} == {"req_1"}
    text = str(found)
    assert "secret" not in text


def test_the_keys_and_offsets_are_those_that_a_plain_consumer_reads(scene: Scene) -> None:
    usages = [
        scene.usage(f"k{place}", place, AT + place, version=1 + place % 3, properties={"note": "n"})
        for place in range(30)
    ]
    outside = [scene.usage(f"o{place}", 1, HOUR + place * HOUR_S) for place in (-1, 1)]
    scene.feed(*usages, *outside, *usages[:7])
    found = scene.ask()
    expected = set()
    for version in (1, 2, 3):
        for one in scene.pipeline.read(f"usage.v{version}"):
            fields = unframe("usage_event", version, one.value)
            key = fields.get("idempotency_key", fields.get("event_id"))
            tenant = fields.get("tenant_id", fields.get("tenant", fields.get("customer", "").split("/")[0]))
            at = fields.get("occurred_at", fields.get("used_at", fields.get("timestamp")))
            at_s = at if isinstance(at, int) else at.timestamp()
            if tenant == scene.tenant and HOUR <= at_s < HOUR + HOUR_S:
                expected.add((one.topic, one.partition, one.offset, key))
    assert {(one.topic, one.partition, one.offset, one.idempotency_key) for one in found.events} == expected
    assert len(expected) == 37 and found.totals.events == 37
    assert found.fates == {"counted": 30, "duplicate": 7}
    assert {one.schema_version for one in found.events} == {1, 2, 3}
    assert found.buckets[0].recomputed == sum(range(30))
    assert {one.quantity for one in found.events if one.fate == "counted"} == set(map(Decimal, range(30)))


def test_duplicates_and_conflicts_name_the_first_record_of_their_key(scene: Scene) -> None:
    first = scene.usage("a", 2)
    (place, *_) = scene.feed(first)
    scene.feed(first, scene.usage("a", 3), scene.usage("b", 4), scene.usage("b", 4), scene.usage("b", 5))
    found = scene.ask()
    assert found.fates == {"counted": 2, "duplicate": 2, "conflict": 2}
    of_a = {one.fate: one for one in found.events if one.idempotency_key == "a" and one.fate != "counted"}
    for one in of_a.values():
        assert one.first is not None
        assert (one.first.topic, one.first.partition, one.first.offset) == place
    parked = of_a["conflict"].parked
    assert parked is not None and parked.kind == "conflict"
    assert checks(found, "events")[0].verdict == "agree"


def test_what_came_too_late_is_an_adjustment_of_its_hour_and_counts_there_once_applied(scene: Scene) -> None:
    scene.feed(scene.usage("new", 1, time.time()))
    with scene.pipeline.database() as db:
        db.execute("UPDATE meters SET lateness_seconds = 60 WHERE tenant_id = %s", (scene.tenant,))
    scene.feed(scene.usage("late", 7))
    waiting = scene.ask()
    assert waiting.fates == {"adjusted": 1} and waiting.buckets == []
    (event,) = waiting.events
    assert event.adjustment is not None and event.adjustment.state == "pending"
    scene.pipeline.approve()
    until(lambda: bool(scene.ask().buckets), "it is applied")
    applied = scene.ask()
    assert applied.events[0].adjustment is not None and applied.events[0].adjustment.state == "applied"
    assert (applied.buckets[0].total, applied.buckets[0].recomputed) == (7, 7)
    assert checks(applied, "events")[0].verdict == "agree"
    assert applied.adjustments == []


def test_an_adjustment_that_happened_elsewhere_is_listed_where_it_counts(scene: Scene) -> None:
    scene.feed(scene.usage("new", 1, time.time()))
    with scene.pipeline.database() as db:
        db.execute(
            "UPDATE meters SET lateness_seconds = 60, late_policy = 'carry_forward' WHERE tenant_id = %s "
            "AND meter = 'sum'",
            (scene.tenant,),
        )
    scene.feed(scene.usage("late", 7))
    own = scene.ask()
    assert own.fates == {"adjusted": 1} and own.events[0].adjustment is not None
    counted_at = own.events[0].adjustment.counted_at
    assert counted_at is not None
    there = scene.ask(hour=counted_at.isoformat())
    assert [(one.idempotency_key, one.quantity) for one in there.adjustments] == [("late", 7)]
    assert there.totals.adjustments == 1
    assert checks(there, "events")[0].verdict == "agree", there.checks


def test_parked_usage_is_listed_and_counted_once_it_is_tried_again(scene: Scene) -> None:
    scene.feed(
        scene.usage("good", 1, meter="split", properties={"region": "eu"}),
        scene.usage("bad", 2, meter="split"),
    )
    parked = scene.ask("split")
    assert parked.fates == {"counted": 1, "parked": 1}
    bad = next(one for one in parked.events if one.fate == "parked")
    assert bad.parked is not None
    assert (bad.parked.reason, bad.parked.state, bad.quantity) == ("dimension_missing", "parked", 2)
    assert checks(parked, "events")[0].verdict == "agree"
    scene.feed(scene.usage("early", 5, meter="unknown"))
    scene.pipeline.meter(scene.tenant, "unknown")
    assert scene.pipeline.query("SELECT 1 FROM items WHERE tenant_id = %s", scene.tenant)
    assert scene.ask("unknown").fates == {"parked": 1}
    with scene.pipeline.database() as db:
        request_redrives(db, Choice(tenant=scene.tenant, meter="unknown"), by="cli:test", dry_run=False)
    until(lambda: scene.ask("unknown").fates == {"recounted": 1}, "it is re-driven")
    found = scene.ask("unknown")
    assert (found.buckets[0].total, found.buckets[0].recomputed) == (5, 5)
    assert found.events[0].parked is not None and found.events[0].parked.state == "redriven"


def test_dimensions_are_items_of_one_customer_hour(scene: Scene) -> None:
    scene.feed(
        *(scene.usage(r, 2, meter="split", properties={"region": r, "note": "n"}) for r in ("eu", "us"))
    )
    found = scene.ask("split")
    assert [one.dimensions for one in found.items] == [{"region": "eu"}, {"region": "us"}]
    assert [one.dimensions for one in found.events] == [{"region": "eu"}, {"region": "us"}]
    assert {one.item: one.total for one in found.buckets} == {0: 2, 1: 2}


# Whose hour it is ---------------------------------------------------------------------------------------


def test_a_customer_is_found_by_both_names_and_a_meter_by_both(scene: Scene) -> None:
    with scene.pipeline.database() as db:
        for ref in ("alpha", "beta"):
            db.execute("INSERT INTO customers VALUES (%s, %s, 'cus_shared')", (scene.tenant, ref))
    scene.feed(scene.usage("a", 2, customer="alpha"), scene.usage("b", 3, customer="beta"))
    scene.report()
    asked = [
        scene.ask(meter, customer)
        for meter in ("sum", f"{scene.tenant}.sum")
        for customer in ("cus_shared", "alpha", "beta")
    ]
    assert all(one == asked[0] for one in asked)
    assert (asked[0].customer_refs, asked[0].stripe_customer) == (["alpha", "beta"], "cus_shared")
    assert (asked[0].stripe.expected, asked[0].totals.items) == (5, 2)
    assert asked[0].agrees
    alone = scene.ask(tenant_id=None, customer="alpha", meter=f"{scene.tenant}.sum")
    assert alone.tenant_id == scene.tenant


def test_a_customer_without_a_stripe_id_has_usage_and_nothing_at_stripe(scene: Scene) -> None:
    scene.feed(scene.usage("a", 2, customer="nobody"))
    found = scene.ask(customer="nobody")
    assert (found.stripe_customer, found.stripe.expected) == (None, 0)
    assert "no Stripe id" in found.stripe.sentence
    (pushes,) = checks(found, "pushes")
    assert pushes.parts == {"not_closed": 2} and "no Stripe id" in pushes.sentence


@pytest.mark.parametrize(
    ("wrong", "code", "path"),
    [
        ({"hour": "2026-01-01T00:00:00"}, "time_invalid", "hour"),
        ({"hour": "yesterday"}, "time_invalid", "hour"),
        ({"hour": "9999-12-31T23:59:59Z"}, "time_invalid", "hour"),
        ({"tenant_id": "nobody"}, "tenant_unknown", "tenantId"),
        ({"meter": "nothing"}, "meter_unknown", "meter"),
        ({"customer": "cus_nobody"}, "customer_unknown", "customer"),
        ({"customer": "nobody"}, "customer_unknown", "customer"),
    ],
)
def test_a_question_that_means_nothing_is_refused_with_the_field(
    scene: Scene, wrong: dict[str, Any], code: str, path: str
) -> None:
    scene.feed(scene.usage("a"))
    with pytest.raises(RefusedQuestion) as refused:
        scene.ask(**wrong)
    assert (refused.value.code, refused.value.path) == (code, path)


def test_a_meter_of_several_tenants_needs_the_tenant(scene: Scene) -> None:
    scene.feed(scene.usage("a"))
    other = f"{scene.tenant}-2"
    scene.pipeline.tenant(other)
    scene.pipeline.meter(other, "sum")
    scene.feed(scene.usage("a", 4, tenant=other))
    with pytest.raises(RefusedQuestion) as refused:
        scene.ask(tenant_id=None)
    assert refused.value.code == "tenant_ambiguous"
    assert scene.ask(tenant_id=other).buckets[0].total == 4


# What does not agree ------------------------------------------------------------------------------------


def test_a_damaged_bucket_is_told_as_a_disagreement(scene: Scene) -> None:
    scene.feed(scene.usage("a", 2), scene.usage("b", 3))
    scene.report()
    scene.damage("total = total + 7, closed = closed + 7")
    found = scene.ask()
    assert verdicts(found) == {"events": "differ", "pushes": "explained", "period": "differ"}
    (events,) = checks(found, "events")
    assert events.difference == 7 and "7 more than the log proves" in events.sentence
    assert not found.agrees
    scene.damage("total = total - 7, closed = closed - 7, events = events + 1")
    (events,) = checks(scene.ask(), "events")
    assert (events.verdict, events.difference) == ("differ", 0)


def test_a_bucket_that_is_gone_is_told_as_a_disagreement(scene: Scene) -> None:
    scene.feed(scene.usage("a", 2))
    with scene.pipeline.database() as db:
        db.execute(
            "DELETE FROM buckets b USING items i WHERE i.item_id = b.item_id AND i.tenant_id = %s",
            (scene.tenant,),
        )
        db.execute("DELETE FROM items WHERE tenant_id = %s", (scene.tenant,))
        db.execute("INSERT INTO customers VALUES (%s, 'cus_1', 'cus_1')", (scene.tenant,))
    found = scene.ask()
    assert found.fates == {"counted": 1} and found.buckets == [] and found.totals.items == 1
    assert [(one.about, one.verdict, one.difference) for one in found.checks] == [("events", "differ", -2)]


def test_a_push_without_a_reason_has_no_explanation(scene: Scene) -> None:
    scene.feed(scene.usage("a", 2))
    scene.report()
    scene.damage("pushed = pushed + 1")
    (pushes,) = checks(scene.ask(), "pushes")
    assert pushes.verdict == "differ" and pushes.parts["unexplained"] == 1


def test_a_fraction_that_is_carried_is_named(scene: Scene) -> None:
    scene.feed(scene.usage("a", "2.4"), scene.usage("b", "0.3", AT - HOUR_S))
    scene.report()
    found = scene.ask()
    (pushes,) = checks(found, "pushes")
    assert pushes.verdict == "explained" and set(pushes.parts) == {"carried_in_period"}
    assert found.buckets[0].carry == Decimal("0.7")
    assert "0.7 is closed and not sent" in checks(found, "period")[0].sentence
    assert found.agrees


@pytest.mark.parametrize(
    ("states", "part", "uncertain"),
    [
        ((), "pending", 0),
        (("in_flight",), "in_flight", 5),
        (("in_flight", "in_doubt"), "in_doubt", 5),
        (("in_flight", "failed"), "failed", 0),
    ],
)
def test_what_is_not_settled_is_named_by_its_state(
    scene: Scene, states: tuple[str, ...], part: str, uncertain: int
) -> None:
    scene.feed(scene.usage("a", 5))
    before = scene.ask()
    assert checks(before, "pushes")[0].parts == {"not_recorded": 5}
    assert [one.recorded for one in before.deltas] == [False]
    scene.record()
    scene.set_intents(*states)
    found = scene.ask()
    (pushes,) = checks(found, "pushes")
    assert (pushes.verdict, pushes.parts) == ("explained", {part: 5})
    assert (found.stripe.expected, found.stripe.uncertain) == (0, uncertain)
    assert found.stripe.by_state[part].amount == 5
    assert found.buckets[0].open


def test_usage_behind_an_open_delta_is_named(scene: Scene) -> None:
    scene.feed(scene.usage("a", 5))
    scene.feed(scene.usage("b", 2))
    (pushes,) = checks(scene.ask(), "pushes")
    assert pushes.parts == {"not_closed": 2, "not_recorded": 5}
    assert "open delta" in pushes.sentence


def test_a_failed_push_that_was_retried_is_told_by_both_meter_events(scene: Scene) -> None:
    scene.feed(scene.usage("a", 5))
    scene.record()
    scene.set_intents("in_flight", "failed", code="bad")
    scene.pipeline.push()
    with scene.pipeline.database() as db, db.transaction():
        assert send_again(db, tenant=scene.tenant) == 1
    until(lambda: scene.ask().totals.deltas == 2, "closed again")
    scene.pipeline.await_quiet()
    scene.report()
    found = scene.ask()
    failed, again = found.intents
    assert (failed.state, failed.retried_as, again.state) == ("failed", again.identifier, "reported")
    assert found.stripe.expected == 5 and found.agrees, found.checks
    assert verdicts(found)["pushes"] == "agree"


def test_what_was_carried_forward_is_told_in_both_hours(scene: Scene) -> None:
    scene.feed(scene.usage("a", 5), scene.usage("now", 1, time.time()))
    scene.record()
    with scene.pipeline.database() as db, db.transaction():
        # What the pusher and the counters do with a push that is too late.
        row = db.execute(
            "UPDATE meter_events SET state = 'cancelled', error_code = 'period_closed' "
            "WHERE tenant_id = %s AND hour_start = to_timestamp(%s) "
            "RETURNING item_id, hour_start, period_start, amount, formula",
            (scene.tenant, HOUR),
        ).fetchone()
        assert row is not None
        back = GiveBack([Returned(*row)])
        back.check(*[db.execute(step, back.values).fetchall() for step in GiveBack.STATEMENTS])
        db.execute("UPDATE items SET dirty_from = NULL WHERE item_id = %s", (row[0],))
        now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
        db.execute(
            "INSERT INTO carry_forwards (item_id, period_start, hour_start, to_period, to_hour, amount, "
            "reason) VALUES (%s, %s, %s, %s, %s, 5, 'period_closed')",
            (row[0], row[2], row[1], row[2], now),
        )
        db.execute(
            "UPDATE buckets SET closed = closed + 5 WHERE item_id = %s AND hour_start = to_timestamp(%s)",
            (row[0], HOUR),
        )
        db.execute("UPDATE buckets SET pushed = pushed + 5 WHERE item_id = %s AND hour_start = %s",
                   (row[0], now))  # fmt: skip
    found = scene.ask()
    assert [(one.direction, one.amount) for one in found.carried] == [("out", 5)]
    (pushes,) = checks(found, "pushes")
    assert (pushes.verdict, pushes.parts) == ("explained", {"carried_forward_out": 5})
    there = scene.ask(hour="now")
    assert [(one.direction, one.amount) for one in there.carried] == [("in", 5)]
    assert checks(there, "pushes")[0].parts["carried_forward_in"] == -5


def test_the_answer_is_what_a_simulated_stripe_holds(scene: Scene) -> None:
    from services.stripe_simulator import SimulatorConfig, running_simulator

    scene.feed(scene.usage("a", 5), scene.usage("b", 6))
    scene.record()
    with running_simulator(SimulatorConfig(port=0, rate_per_second=100_000)) as control:
        control.seed(customers=["cus_1"], meters=[f"{scene.tenant}.sum"])
        world = World(scene.pipeline.dsn, control)
        mine = "UPDATE meter_events SET next_attempt_at = now() + interval '1 day' WHERE tenant_id <> %s"
        world.sql(mine, (scene.tenant,))

        async def send() -> None:
            async with world.sending():
                await until_async(lambda: not world.sql(
                    "SELECT 1 FROM meter_events WHERE tenant_id = %s AND state <> 'reported'", (scene.tenant,)
                ))  # fmt: skip

        asyncio.run(send())
        found = scene.ask()
        assert found.stripe.expected == Decimal(control.total()) == 11
        assert found.agrees and found.intents[0].http_status == 200 and found.intents[0].request_id


# Large hours, and a log that is gone --------------------------------------------------------------------


def test_at_most_the_limit_is_listed_and_everything_is_counted(scene: Scene) -> None:
    scene.feed(*(scene.usage(f"k{place}", 1, AT + place) for place in range(50)))
    scene.report()
    seen: list[tuple[int, int]] = []
    question = Question(customer="cus_1", meter="sum", hour=HOUR_TEXT, tenant_id=scene.tenant, limit=7)
    found = explainer(scene.pipeline).explain(question, progress=lambda *numbers: seen.append(numbers))
    assert (len(found.events), found.totals.events, found.truncated) == (7, 50, True)
    assert found.buckets[0].recomputed == 50
    assert seen and seen[-1][0] <= seen[-1][1]
    none = scene.ask(limit=0)
    assert (none.events, none.intents, none.buckets, none.checks) == ([], [], [], [])
    assert none.totals.checks == {"agree": 3} and none.agrees


def test_an_hour_that_needs_too_many_records_is_refused(scene: Scene) -> None:
    scene.feed(*(scene.usage(f"k{place}") for place in range(5)))
    settings = load_settings(
        kafka_bootstrap=scene.pipeline.kafka, postgres_dsn=scene.pipeline.dsn, replay_records_max=3
    )
    with pytest.raises(RefusedQuestion) as refused:
        Explainer(settings).explain(
            Question(customer="cus_1", meter="sum", hour=HOUR_TEXT, tenant_id=scene.tenant)
        )
    assert refused.value.code == "hour_too_large"


# The command --------------------------------------------------------------------------------------------


def run(scene: Scene, monkeypatch: pytest.MonkeyPatch, *arguments: str, hour: str = HOUR_TEXT) -> Any:
    monkeypatch.setenv("TIDEMETER_POSTGRES_DSN", scene.pipeline.dsn)
    monkeypatch.setenv("TIDEMETER_KAFKA_BOOTSTRAP", scene.pipeline.kafka)
    options = ["--customer", "cus_1", "--meter", "sum", "--hour", hour, "--tenant", scene.tenant]
    return CliRunner().invoke(command, ["explain", *options, *arguments])


def test_the_command_tells_it_in_tables_and_as_json(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.feed(scene.usage("first-key", 2), scene.usage("first-key", 2))
    scene.report()
    plain = run(scene, monkeypatch)
    assert plain.exit_code == 0, plain.output
    for words in ("Stripe should hold 2", "first-key", "duplicate", "reported", "and so does the bucket"):
        assert words in plain.stdout, plain.stdout
    document = json.loads(run(scene, monkeypatch, "--json").stdout)
    assert document["stripe"]["expected"] == "2"
    assert document["fates"] == {"counted": 1, "duplicate": 1}
    limited = run(scene, monkeypatch, "--limit", "1")
    assert "1 of 2 events" in limited.stderr
    scene.damage("total = total + 1")
    damaged = run(scene, monkeypatch)
    assert damaged.exit_code == ATTENTION and "1 more than the log proves" in damaged.stdout


def test_the_command_refuses_a_naive_time_and_unknown_names(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, hour, words in (
        ([], "2026-11-22T10:00:00", "is no time"),
        (["--customer", "nobody"], HOUR_TEXT, "no such customer"),
        (["--meter", "nothing"], HOUR_TEXT, "no meter has this slug"),
        (["--tenant", "nothing"], HOUR_TEXT, "no such tenant"),
    ):
        result = run(scene, monkeypatch, *arguments, hour=hour)
        assert (result.exit_code, words in result.stderr) == (MISUSED, True), result.stderr


# HTTP ---------------------------------------------------------------------------------------------------


@pytest.fixture
def client(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient[Litestar]]:
    monkeypatch.setenv("TIDEMETER_POSTGRES_DSN", scene.pipeline.dsn)
    monkeypatch.setenv("TIDEMETER_KAFKA_BOOTSTRAP", scene.pipeline.kafka)
    with console(scene.pipeline.dsn, scene.pipeline.dsn) as client:
        yield client


def test_the_api_answers_the_same_and_a_tenants_key_only_of_its_own(
    scene: Scene, client: TestClient[Litestar]
) -> None:
    scene.feed(scene.usage("a", 2))
    scene.report()
    other = f"{scene.tenant}-2"
    scene.pipeline.tenant(other)
    scene.pipeline.meter(other, "theirs")
    with scene.pipeline.database() as db:
        own, theirs, all_ = (key_header(db, name, "read") for name in (scene.tenant, other, None))
        unscoped = key_header(db, scene.tenant, "ingest")
    asked = {"customer": "cus_1", "meter": "sum", "hour": HOUR_TEXT}
    answer = client.get("/v1/explain", params=asked, headers=own)
    assert answer.status_code == 200, answer.text
    document = answer.json()
    assert document["stripe"]["expected"] == "2" and document["tenantId"] == scene.tenant
    assert [one["idempotencyKey"] for one in document["events"]] == ["a"]
    same = client.get("/v1/explain", params={**asked, "tenantId": scene.tenant}, headers=all_)
    assert same.json()["checks"] == document["checks"]
    unknown = client.get("/v1/explain", params=asked, headers=theirs)
    assert (unknown.status_code, unknown.json()["code"], unknown.json()["path"]) == (
        *(404, "meter_unknown", "meter"),
    )
    foreign = client.get("/v1/explain", params={**asked, "tenantId": scene.tenant}, headers=theirs)
    assert (foreign.status_code, foreign.json()["code"]) == (403, "tenant_forbidden")
    assert client.get("/v1/explain", params=asked, headers=unscoped).json()["code"] == "scope_missing"
    assert client.get("/v1/explain", params=asked).status_code == 401


@pytest.mark.parametrize(
    ("wrong", "status", "code", "path"),
    [
        ({"hour": "2026-01-01T00:00:00"}, 400, "time_invalid", "hour"),
        ({"customer": "nobody"}, 404, "customer_unknown", "customer"),
        ({"meter": "nothing"}, 404, "meter_unknown", "meter"),
        ({"tenantId": "nothing"}, 404, "tenant_unknown", "tenantId"),
        ({"tenant": "x"}, 400, "parameter_unknown", "query"),
        ({"limit": "100000"}, 400, "parameter_invalid", "limit"),
    ],
)
def test_the_api_refuses_with_the_field(
    scene: Scene, client: TestClient[Litestar], wrong: dict[str, str], status: int, code: str, path: str
) -> None:
    with scene.pipeline.database() as db:
        headers = key_header(db, None, "read")
    asked = {"customer": "cus_1", "meter": "sum", "hour": HOUR_TEXT, "tenantId": scene.tenant, **wrong}
    answer = client.get("/v1/explain", params=asked, headers=headers)
    document = answer.json()
    assert (answer.status_code, document["code"], document["path"]) == (status, code, path), document


def test_the_route_is_documented_with_its_answer_and_refusals() -> None:
    document = openapi_document(ROUTES)
    operation = document["paths"]["/v1/explain"]["get"]
    assert {one["name"] for one in operation["parameters"]} == {
        *("customer", "meter", "hour", "tenantId", "limit"),
    }
    assert {"200", "400", "401", "403", "404", "409", "503"} <= operation["responses"].keys()
    schema = document["components"]["schemas"]["Explanation"]["properties"]
    assert {"stripe", "intents", "deltas", "buckets", "events", "checks"} <= schema.keys()


class Shelf:
    """An archive in memory: what the topics hold now."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._records: dict[Partition, list[Raw]] = {}
        with_times = Consumer({"bootstrap.servers": pipeline.kafka, "group.id": "shelf"})
        starts, ends = pipeline.log_bounds()
        for tp, end in ends.items():
            with_times.assign([TopicPartition(*tp, starts[tp])])
            kept: list[Raw] = []
            while starts[tp] + len(kept) < end:
                for one in with_times.consume(1000, 0.2):
                    kept.append(Raw(one.offset(), one.value(), one.timestamp()[1]))
            self._records[Partition(*tp)] = kept
        with_times.close()

    def held(self, tp: Partition) -> list[tuple[int, int]]:
        kept = self._records[tp]
        return [(kept[0].offset, kept[-1].offset + 1)] if kept else []

    def read(self, tp: Partition, start: int, end: int) -> Iterator[list[Raw]]:
        if found := [one for one in self._records[tp] if start <= one.offset < end]:
            yield found


def test_the_log_that_is_gone_is_told_with_the_earliest_hour_that_is_there(scene: Scene) -> None:
    """The last test here: it takes the log away."""
    scene.feed(scene.usage("a", 2), scene.usage("bad", 1, meter="split"))
    scene.report()
    shelf = Shelf(scene.pipeline)
    _, ends = scene.pipeline.log_bounds()
    gone = [TopicPartition(*tp, end) for tp, end in ends.items()]
    for future in scene.pipeline.admin.delete_records(gone).values():
        future.result()
    found = scene.ask()
    assert not found.records.complete and found.records.missing > 0
    assert found.records.earliest is not None and found.records.earliest.timestamp() > AT
    assert "neither in the log nor in the archive" in found.records.sentence
    assert found.events == [] and found.buckets[0].recomputed is None
    assert verdicts(found) == {"events": "unknown", "pushes": "agree", "period": "agree"}
    assert not found.agrees
    kept = scene.ask("split")
    assert [(one.fate, one.source) for one in kept.events] == [("parked", "parked_record")]
    again = Explainer(
        load_settings(kafka_bootstrap=scene.pipeline.kafka, postgres_dsn=scene.pipeline.dsn), shelf
    ).explain(Question(customer="cus_1", meter="sum", hour=HOUR_TEXT, tenant_id=scene.tenant))
    assert again.records.complete and again.agrees
    assert [(one.source, one.idempotency_key) for one in again.events] == [("archive", "a")]
