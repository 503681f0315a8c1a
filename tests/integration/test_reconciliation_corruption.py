"""A thousand random corruptions, of our tables or of Stripe's: each is found and named, and nothing else is.

They are done in rounds: several at once, each to another customer and meter, then one reconciliation, then
all of them undone. Whatever was not touched has to be well every time.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from services.streaming.reconciliation import Finding
from tests.integration.reconciling import Scene, declare, hours_ago, open_scene

SEED = int(os.environ.get("FAULT_SEED") or 8)
CORRUPTIONS = 1000
CUSTOMERS = 10
HOURS = 12
METERS = {
    "requests": "sum",
    "credits": "sum",
    "jobs": "count",
    "peak": "max",
    "level": "last",
    "users": "unique",
}

Name = tuple[str, str]
Undo = Callable[[], None]


@dataclass(frozen=True)
class Corruption:
    """What was done to which customer and meter, in which hour if it has one, and how it is undone."""

    kind: str
    name: Name
    hour: str | None
    undo: Undo


@pytest.fixture
def scene(postgres_dsn: str) -> Iterator[Scene]:
    chance = random.Random(SEED)  # noqa: S311
    with open_scene(postgres_dsn) as scene:
        declare(scene, "credits", allow_negative=True, scale=1)
        declare(scene, "jobs", "count", dimensions=["region"])
        declare(scene, "peak", "max", value_property="gb", scale=2)
        declare(scene, "level", "last")
        declare(scene, "users", "unique", value_property="who")
        scene.sql("UPDATE meters SET scale = 1 WHERE meter = 'requests'")
        uses = []
        for number in range(CUSTOMERS * HOURS * 2):
            at = hours_ago(chance.randrange(1, HOURS + 1))
            for meter in METERS:
                uses.append(
                    scene.books.use(
                        f"{meter}-{number}",
                        at,
                        str(Decimal(chance.randrange(1, 900)) / 100),
                        meter,
                        customer_ref=f"cus_{number % CUSTOMERS}",
                        region=chance.choice(("eu", "us")),
                        gb=str(chance.randrange(1, 10_000) / 100),
                        who=f"w{chance.randrange(9)}",
                    )
                )
        for start in range(0, len(uses), 400):
            scene.books.now = scene.world.now().replace(tzinfo=None).isoformat()
            scene.books.count(*uses[start : start + 400])
            scene.bill()
        yield scene


@pytest.mark.timeout(900)
def test_a_thousand_corruptions_are_found_each_and_ten_clean_runs_raise_no_alarm(scene: Scene) -> None:
    chance = random.Random(SEED)  # noqa: S311
    names = sorted({(one.customer_ref, one.metric) for one in reconciled(scene)})
    assert len(names) == CUSTOMERS * len(METERS)
    for _ in range(10):
        assert {one.state for one in reconciled(scene)} == {"ok"}
    found: Counter[str] = Counter()
    while found.total() < CORRUPTIONS:
        chosen = chance.sample(names, min(len(names) * 2 // 3, CORRUPTIONS - found.total()))
        done = [corruption for name in chosen if (corruption := corrupt(scene, chance, name))]
        scene.world.advance(timedelta(seconds=61))  # what is cancelled at Stripe goes after a while
        alarms: defaultdict[Name, list[Finding]] = defaultdict(list)
        for one in reconciled(scene):
            if one.state != "ok":
                alarms[one.customer_ref, one.metric] += one.findings
        for corruption in done:
            findings = alarms.pop(corruption.name, None)
            assert findings is not None, f"not found: {corruption}"
            assert findings, f"not explained: {corruption}"
            if corruption.hour is not None:
                hours = {f"{one.hour:%Y-%m-%dT%H}" for one in findings if one.hour is not None}
                assert corruption.hour in hours, f"another hour: {corruption}, {findings}"
            found[corruption.kind] += 1
        assert not alarms, f"false alarms: {alarms}"
        for corruption in done:
            corruption.undo()
        scene.world.advance(timedelta(seconds=61))
    assert {one.state for one in reconciled(scene)} == {"ok"}
    assert found.keys() == {*OURS, *STRIPES}
    print(
        json.dumps(
            {"test": "corruptions", "seed": SEED, "found": found.total(), **dict(sorted(found.items()))}
        )
    )


def reconciled(scene: Scene) -> list[Any]:
    scene.reconcile()
    return scene.summary().periods


def corrupt(scene: Scene, chance: random.Random, name: Name) -> Corruption | None:
    """One of the kinds that there are; None where it finds nothing that it could change."""
    kind = chance.choice((*OURS, *STRIPES, *STRIPES))
    done = (OURS.get(kind) or STRIPES[kind])(scene, chance, name)
    return None if done is None else Corruption(kind, name, *done)


# Our tables ---------------------------------------------------------------------------------------------

Done = tuple[str | None, Undo]


def rows_of(scene: Scene, table: str, name: Name, condition: str = "true") -> list[dict[str, Any]]:
    cursor = scene.books.db.cursor()
    cursor.execute(
        f"SELECT t.*, t.ctid::text AS place FROM {table} t JOIN items i USING (item_id) "  # type: ignore[arg-type]
        f"WHERE (i.customer_ref, i.meter) = (%s, %s) AND {condition} ORDER BY t::text",
        name,
    )
    columns = [column.name for column in cursor.description or ()]
    return [dict(zip(columns, row, strict=True)) for row in cursor.fetchall()]


def put_back(scene: Scene, table: str, row: dict[str, Any], key: tuple[str, ...]) -> Undo:
    """Delete what has this key now, and insert the row as it was."""
    names = [name for name in row if name != "place"]
    marks = ", ".join("%s" for _ in names)
    values = [json.dumps(row[name]) if isinstance(row[name], dict) else row[name] for name in names]

    def undo() -> None:
        where = " AND ".join(f"{name} = %s" for name in key)
        with scene.books.db.transaction():
            scene.books.db.execute("SET LOCAL session_replication_role = replica")
            scene.books.db.execute(f"DELETE FROM {table} WHERE {where}", [row[name] for name in key])  # type: ignore[arg-type]
            scene.books.db.execute(
                f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks})",
                values,  # type: ignore[arg-type]
            )

    return undo


def hour_text(row: dict[str, Any]) -> str:
    return f"{row['hour_start'].astimezone(UTC):%Y-%m-%dT%H}"


KEYS = {
    "buckets": ("item_id", "hour_start", "period_start"),
    "deltas": ("identifier",),
    "meter_events": ("identifier",),
    "item_periods": ("item_id", "period_start"),
}


def changed(table: str, change: str, condition: str = "true") -> Callable[..., Done | None]:
    """Change one row. ``change``: what follows SET; %(by)s is an amount that is not 0."""

    def go(scene: Scene, chance: random.Random, name: Name) -> Done | None:
        rows = rows_of(scene, table, name, condition)
        if not rows:
            return None
        row = chance.choice(rows)
        by = chance.choice((-1, 1)) * Decimal(chance.randrange(1, 5000)) / 10
        scene.damage(
            f"UPDATE {table} SET {change.replace('%(by)s', f'({by})')} WHERE ctid = %s::tid", row["place"]
        )
        return hour_text(row) if "hour_start" in row else None, put_back(scene, table, row, KEYS[table])

    return go


def deleted(table: str, condition: str = "true") -> Callable[..., Done | None]:
    def go(scene: Scene, chance: random.Random, name: Name) -> Done | None:
        rows = rows_of(scene, table, name, condition)
        if not rows:
            return None
        row = chance.choice(rows)
        scene.damage(f"DELETE FROM {table} WHERE ctid = %s::tid", row["place"])
        return hour_text(row) if "hour_start" in row else None, put_back(scene, table, row, KEYS[table])

    return go


def moved_bucket(scene: Scene, chance: random.Random, name: Name) -> Done | None:
    """Usage that is said to have happened weeks before."""
    rows = rows_of(scene, "buckets", name, "t.pushed <> 0")
    if not rows:
        return None
    row = chance.choice(rows)
    to = row["hour_start"] - timedelta(days=20, hours=3)
    scene.damage("UPDATE buckets SET hour_start = %s WHERE ctid = %s::tid", to, row["place"])
    back = put_back(scene, "buckets", row, KEYS["buckets"])

    def undo() -> None:
        scene.damage("DELETE FROM buckets WHERE (item_id, hour_start) = (%s, %s)", row["item_id"], to)
        back()

    return hour_text(row), undo


def invented_bucket(scene: Scene, chance: random.Random, name: Name) -> Done | None:
    """An hour in which nothing was used, as if it was counted and closed."""
    if name[1] in ("level", "peak"):
        return None
    row = chance.choice(rows_of(scene, "buckets", name))
    hour = row["hour_start"] + timedelta(hours=-HOURS - 5)
    if hour < row["period_start"]:
        return None
    new = {**row, "hour_start": hour, "total": 7, "closed": 7, "pushed": 0, "sequence": 0}
    names = [column for column in new if column != "place"]
    marks = ", ".join("%s" for _ in names)
    scene.damage(f"INSERT INTO buckets ({', '.join(names)}) VALUES ({marks})", *[new[one] for one in names])

    def undo() -> None:
        scene.damage("DELETE FROM buckets WHERE item_id = %s AND hour_start = %s", row["item_id"], hour)

    return None, undo


def invented_carry(scene: Scene, chance: random.Random, name: Name) -> Done | None:
    """Usage that is said to have gone to another period."""
    if name[1] == "level":
        return None
    row = chance.choice(rows_of(scene, "buckets", name))
    scene.damage(
        "INSERT INTO carry_forwards (item_id, period_start, hour_start, to_period, to_hour, amount, reason) "
        "VALUES (%s, %s, %s, '2030-01-01', '2030-01-01', 3, 'period_closed')",
        *(row["item_id"], row["period_start"], row["hour_start"]),
    )
    return None, lambda: scene.damage("DELETE FROM carry_forwards WHERE item_id = %s", row["item_id"])


#: Only what concerns money: an hour of a `max` meter that never was its peak is not billed, nor is a value of
#: a `last` meter that a later one of its hour has replaced.
OURS: dict[str, Callable[..., Done | None]] = {
    "bucket total": changed("buckets", "total = total + %(by)s"),
    "bucket closed": changed("buckets", "closed = closed + %(by)s"),
    "bucket pushed": changed("buckets", "pushed = pushed + %(by)s"),
    "bucket open": changed("buckets", "open = NOT open"),
    "bucket moved": moved_bucket,
    "bucket deleted": deleted("buckets", "t.pushed <> 0"),
    "bucket invented": invented_bucket,
    "carry": changed("item_periods", "carry = carry + %(by)s", "i.meter <> 'level'"),
    "carry forward invented": invented_carry,
    "peak": changed("item_periods", "value = value + %(by)s", "i.meter = 'peak'"),
    "delta amount": changed("deltas", "amount = amount + %(by)s"),
    "delta deleted": deleted("deltas"),
    "meter event amount": changed("meter_events", "amount = amount + %(by)s"),
    "meter event deleted": deleted("meter_events"),
    "meter event failed": changed("meter_events", "state = 'failed'"),
    "meter event cancelled": changed("meter_events", "state = 'cancelled'", "i.meter <> 'level'"),
}


# Stripe -------------------------------------------------------------------------------------------------


def event_at_stripe(scene: Scene, name: Name, value: str, at: datetime, **more: Any) -> str:
    created = scene.world._client().v1.billing.meter_events.create(
        {
            "event_name": name[1],
            "payload": {"stripe_customer_id": name[0], "value": value, **more},
            "timestamp": int(at.timestamp()),
        }
    )
    return created.identifier


def cancel_at_stripe(scene: Scene, name: Name, identifier: str) -> None:
    scene.world._client().v1.billing.meter_event_adjustments.create(
        {"event_name": name[1], "type": "cancel", "cancel": {"identifier": identifier}}
    )


def foreign_event(scene: Scene, chance: random.Random, name: Name) -> Done | None:
    """Somebody else writes to this customer and meter."""
    at = datetime.fromisoformat(hours_ago(chance.randrange(1, HOURS + 1))).replace(tzinfo=UTC)
    hour = f"{at:%Y-%m-%dT%H}"
    value = str(chance.randrange(10_000, 20_000))
    identifier = event_at_stripe(scene, name, value, at + timedelta(minutes=40))
    return hour, lambda: cancel_at_stripe(scene, name, identifier)


def lost_event(scene: Scene, chance: random.Random, name: Name) -> Done | None:
    """Stripe loses what it took."""
    rows = [
        row
        for row in scene.world.stripe.ledger(customer=name[0], event_name=name[1])["rows"]
        if row["cancelled_at"] is None
    ]
    if name[1] == "level":
        rows = [row for row in rows if is_shown(row, rows)]
    if not rows:
        return None
    row = chance.choice(rows)
    at = datetime.fromtimestamp(row["timestamp"], UTC)
    cancel_at_stripe(scene, name, row["identifier"])
    return (
        f"{at:%Y-%m-%dT%H}",
        lambda: event_at_stripe(scene, name, row["value"], at, **row["dimensions"]) and None,
    )


def is_shown(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Whether Stripe would show another value of the hour without it: only the latest counts."""
    of_hour = [one for one in rows if one["timestamp"] // 3600 == row["timestamp"] // 3600]
    *before, newest = sorted(of_hour, key=lambda one: (one["timestamp"], one["sequence"]))
    return row is newest and row["value"] != (before[-1]["value"] if before else "0")


STRIPES: dict[str, Callable[..., Done | None]] = {
    "foreign event at Stripe": foreign_event,
    "event lost at Stripe": lost_event,
}
