"""Times as operators write them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from services.wire.errors import Misconfigured
from services.wire.times import moment

NOW = datetime(2026, 11, 22, 9, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "away"),
    [
        ("24h", -timedelta(hours=24)),
        ("90m", -timedelta(minutes=90)),
        ("7d", -timedelta(days=7)),
        ("-PT24H", -timedelta(hours=24)),
        ("PT30S", timedelta(seconds=30)),
        ("-P3D", -timedelta(days=3)),
        ("now", timedelta()),
    ],
)
def test_a_duration_is_that_far_from_now(text: str, away: timedelta) -> None:
    assert moment(text, NOW) == NOW + away


def test_a_time_has_an_offset() -> None:
    assert moment("2026-11-22T09:00:00+01:00", NOW) == datetime(2026, 11, 22, 8, tzinfo=UTC)
    assert moment("2026-11-22T09:00:00Z", NOW) == NOW


@pytest.mark.parametrize(
    "text",
    ["", "yesterday", "2026-11-22", "2026-11-22T09:00:00", "P1M", "-24h", "24", "1000000d", "-P99999999D"],
)
def test_anything_else_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(Misconfigured, match="24h"):
        moment(text, NOW)
