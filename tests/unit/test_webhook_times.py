"""Times as operators write them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from services.cli.webhooks import _moment
from services.wire.errors import Misconfigured


@pytest.mark.parametrize(
    ("text", "ago"),
    [
        ("24h", timedelta(hours=24)),
        ("90m", timedelta(minutes=90)),
        ("7d", timedelta(days=7)),
        ("-PT24H", timedelta(hours=24)),
        ("PT30S", timedelta(seconds=30)),
        ("-P3D", timedelta(days=3)),
    ],
)
def test_a_duration_is_that_long_ago(text: str, ago: timedelta) -> None:
    moment = _moment(text)
    assert moment is not None
    assert abs(datetime.now(UTC) - ago - moment) < timedelta(seconds=10)


def test_a_time_has_a_zone() -> None:
    assert _moment("2026-11-22T09:00:00+01:00") == datetime(2026, 11, 22, 8, tzinfo=UTC)
    assert _moment(None) is None


@pytest.mark.parametrize(
    "text", ["", "yesterday", "2026-11-22", "2026-11-22T09:00:00", "P1M", "PT1D", "-24h", "24", "1000000d"]
)
def test_anything_else_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(Misconfigured, match="24h"):
        _moment(text)
