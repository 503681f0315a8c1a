"""The fuzzer's check itself: its seeds are records of every schema, and what is no record is refused."""

from __future__ import annotations

from tests.fuzz.fuzz_decoder import SCHEMAS, check, seeds


def test_every_seed_is_a_record_and_every_schema_has_one() -> None:
    found = list(seeds())
    assert {seed[0] for seed in found} == set(range(len(SCHEMAS)))
    assert all(check(seed) for seed in found)


def test_a_seed_that_was_cut_or_claims_no_schema_is_refused() -> None:
    for seed in seeds():
        assert not check(seed[:-1])
        assert not check(b"\xff" + seed)
    assert not check(b"")
