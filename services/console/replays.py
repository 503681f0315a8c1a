"""Replays as they are shown: by HTTP, and by the command."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any

import msgspec

from services.streaming.replay_plan import Plan
from services.streaming.replays import State
from services.web.problems import Problem
from services.wire.times import utc


class ReplayError(msgspec.Struct, frozen=True):
    """Why a replay was refused, or failed."""

    code: str
    message: str


class Replay(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A replay that was asked for with `mode: apply`.

    `requested`: waits for a replayer. `running`: reads, adds up, compares. `done`: carried out, as `result`
    says. `refused`: it could not be, and changed nothing. `failed`: ended by a defect, and changed nothing.
    `cancelled`: stopped before it changed anything.
    """

    id: int
    state: State
    tenant_id: str | None
    metrics: list[str]
    customer_ref: str | None
    since: Annotated[datetime | None, msgspec.Meta(description="Full hour; null: without bound.")]
    until: datetime | None
    plan_hash: Annotated[str | None, msgspec.Meta(description="What it may do, and nothing else.")]
    records_read: int
    records_total: Annotated[int, msgspec.Meta(description="0: not known yet.")]
    requested_by: Annotated[str, msgspec.Meta(description="`key:<key id>`, or a name.")]
    requested_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: ReplayError | None
    result: Annotated[Plan | None, msgspec.Meta(description="Of one that is `done`. Lists leave it out.")]


class ReplayProblem(Problem, omit_defaults=True, frozen=True, rename="camel"):
    """Why there is no replay. `replayId`: the one that ended; of `replay_overlaps` the one in the way."""

    replay_id: int | None = None


def shown(row: Mapping[str, Any]) -> Replay:
    """A row of ``replays``."""
    code, _, message = (row["error"] or "").partition(": ")
    result = row.get("result")
    return Replay(
        id=row["replay_id"],
        metrics=row["meters"] or [],
        customer_ref=row["request"].get("customerRef"),
        since=row["since"] and utc(row["since"]),
        until=row["until"] and utc(row["until"]),
        requested_at=utc(row["requested_at"]),
        started_at=row["started_at"] and utc(row["started_at"]),
        finished_at=row["finished_at"] and utc(row["finished_at"]),
        error=ReplayError(code, message) if code else None,
        result=None if result is None else msgspec.convert(result, Plan),
        **{
            name: row[name]
            for name in ("state", "tenant_id", "plan_hash", "records_read", "records_total", "requested_by")
        },
    )
