"""When everything stops, and how it starts again."""

from __future__ import annotations

from services.pusher.brake import BAD_IN_A_ROW_MAX, PAUSE_CAP_SECONDS, Brake
from services.pusher.intents import Meaning


def test_a_refused_key_pauses_at_once() -> None:
    brake = Brake()
    brake.note(Meaning.UNAUTHORISED, now=100.0, chance=0.9)
    assert brake.seconds_left(100.0) > 0
    assert brake.reason == "unauthorised"


def test_only_many_bad_answers_in_a_row_pause() -> None:
    brake = Brake()
    for _ in range(3):
        for _ in range(BAD_IN_A_ROW_MAX - 1):
            brake.note(Meaning.THROTTLED, now=0.0, chance=0.5)
        assert not brake.probing
        brake.note(Meaning.DELIVERED, now=0.0, chance=0.5)
    for _ in range(BAD_IN_A_ROW_MAX):
        brake.note(Meaning.UNKNOWN, now=0.0, chance=0.5)
    assert brake.probing


def test_calls_already_under_way_do_not_lengthen_the_pause() -> None:
    brake = Brake()
    brake.note(Meaning.UNAUTHORISED, now=0.0, chance=0.9)
    left = brake.seconds_left(0.0)
    for _ in range(100):
        brake.note(Meaning.UNAUTHORISED, now=0.0, chance=0.9)
    assert brake.seconds_left(0.0) == left


def test_each_failed_probe_pauses_longer_up_to_a_cap_and_one_success_ends_it() -> None:
    brake, now, waits = Brake(), 0.0, []
    for _ in range(12):
        brake.note(Meaning.UNAUTHORISED, now=now, chance=0.999)
        left = brake.seconds_left(now)
        waits.append(round(left, 6))
        now += left
        assert brake.seconds_left(now) == 0 and brake.probing
    assert waits == sorted(waits) and 30 < waits[-1] <= PAUSE_CAP_SECONDS
    brake.note(Meaning.DELIVERED, now=now, chance=0.5)
    assert not brake.probing and brake.reason is None
