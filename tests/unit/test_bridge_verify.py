"""Signatures, judged by Stripe's own library: it signs, and nothing it would refuse is accepted."""

from __future__ import annotations

import time

import pytest
import stripe
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.bridge.verify import HEADER_BYTES_MAX, SIGNATURES_MAX, TOLERANCE_S, read_signature, verify
from services.web.problems import RequestRefused

NOW = 1_800_000_000
SECRET, OTHER = "whsec_one", "whsec_two"
BODY = '{"id": "evt_1", "type": "invoice.paid", "data": {"object": {"id": "in_1"}}}'


def signed(body: str = BODY, secret: str = SECRET, at_s: int = NOW) -> str:
    return stripe.WebhookSignature.generate_signature_header(body, secret, at_s)


def refusal(
    *lines: str | bytes, body: str | bytes = BODY, secrets: tuple[str, ...] = (SECRET,), now_s: float = NOW
) -> str | None:
    """The code it is refused with; None if it is believed."""
    raw = body.encode() if isinstance(body, str) else body
    headers = [line.encode("latin-1") if isinstance(line, str) else line for line in lines]
    try:
        verify(read_signature(headers), raw, [secret.encode() for secret in secrets], now_s)
    except RequestRefused as error:
        assert error.status == 400
        return error.problem.code
    return None


def stripe_believes(body: bytes, header: str, secret: str) -> bool:
    try:
        return bool(stripe.WebhookSignature.verify_header(body, header, secret, None))
    except (stripe.SignatureVerificationError, UnicodeError):
        return False


@given(st.text(), st.text(min_size=1, alphabet=st.characters(codec="ascii", categories=["L", "N"])))
def test_what_stripe_signs_is_believed(body: str, secret: str) -> None:
    assert refusal(signed(body, secret), body=body, secrets=(secret,)) is None


def test_no_byte_of_the_body_may_change() -> None:
    header, raw = signed(), BODY.encode()
    assert refusal(header) is None
    for at in range(len(raw)):
        for byte in {raw[at] ^ 1, raw[at] ^ 0x20, raw[at] ^ 0x80, 0}:
            changed = raw[:at] + bytes([byte]) + raw[at + 1 :]
            assert refusal(header, body=changed) == "signature_invalid"
        assert refusal(header, body=raw[:at] + raw[at + 1 :]) == "signature_invalid"
        assert refusal(header, body=raw[:at] + b" " + raw[at:]) == "signature_invalid"


def test_no_byte_of_the_header_may_change() -> None:
    header = signed().encode()
    for at in range(len(header)):
        for byte in set(range(256)) - {header[at]}:
            changed = header[:at] + bytes([byte]) + header[at + 1 :]
            assert refusal(changed) in ("signature_malformed", "signature_invalid")
        assert refusal(header[:at] + header[at + 1 :]) is not None


@pytest.mark.parametrize(
    ("age_s", "code"),
    [
        (0, None),
        (299, None),
        (TOLERANCE_S, None),
        (301, "timestamp_outside_tolerance"),
        (-299, None),
        (-301, "timestamp_outside_tolerance"),
        (10**9, "timestamp_outside_tolerance"),
    ],
)
def test_a_signature_is_good_for_five_minutes_in_both_directions(age_s: int, code: str | None) -> None:
    assert refusal(signed(at_s=NOW - age_s)) == code


def test_the_age_of_a_wrong_signature_is_not_told() -> None:
    assert refusal(signed(secret=OTHER, at_s=NOW - 3600)) == "signature_invalid"


def test_either_secret_of_a_roll_will_do_and_no_third() -> None:
    for secret in (SECRET, OTHER):
        assert refusal(signed(secret=secret), secrets=(SECRET, OTHER)) is None
    assert refusal(signed(secret="whsec_three"), secrets=(SECRET, OTHER)) == "signature_invalid"


def test_one_good_signature_among_several_is_enough_wherever_it_stands() -> None:
    moment, _, good = signed().partition(",")
    other = signed(secret=OTHER).partition(",")[2]
    for header in (f"{moment},{good},{other}", f"{moment},{other},{good}", f"{good},{moment}"):
        assert refusal(header) is None
    assert refusal(f"{moment},{other},{other}") == "signature_invalid"


@pytest.mark.parametrize("scheme", ["v0", "v2", "V1", " v1", "v1 ", ""])
def test_only_the_scheme_v1_counts(scheme: str) -> None:
    moment, _, good = signed().partition(",")
    value = good.removeprefix("v1=")
    assert refusal(f"{moment},{scheme}={value}") == "signature_invalid"
    assert refusal(f"{moment},{scheme}={value},{good}") is None


@pytest.mark.parametrize(
    "header",
    [
        "",
        "t=1",
        "t",
        "v1=aa",
        "t=,v1=aa",
        "t=-1,v1=aa",
        "t=01,v1=aa",
        "t=+1,v1=aa",
        "t= 1,v1=aa",
        "t=1_0,v1=aa",
        "t=1.0,v1=aa",
        "t=\u0661,v1=aa".encode(),
        "t=1800000000,t=1800000000,v1=aa",
        "t=9999999999999,v1=aa",
        "t=1800000000,v1=aa,",
        "t=1800000000;v1=aa",
        b"\xff\x00",
    ],
)
def test_a_header_that_stripe_never_sends_is_refused(header: str | bytes) -> None:
    assert refusal(header) in ("signature_malformed", "signature_invalid")


def test_a_header_is_there_once_and_bounded() -> None:
    assert refusal() == "signature_missing"
    assert refusal(signed(), signed()) == "signature_malformed"
    moment, _, good = signed().partition(",")
    most = ",".join([moment, *["v1=" + "0" * 64] * (SIGNATURES_MAX - 1), good])
    assert refusal(most) is None
    assert refusal(f"{most},{good}") == "signature_malformed"
    padding = HEADER_BYTES_MAX - len(signed()) - len(",v0=")
    assert refusal(f"{signed()},v0={'0' * padding}") is None
    assert refusal(f"{signed()},v0={'0' * (padding + 1)}") == "signature_malformed"


HEADER_LIKE = st.one_of(
    st.binary(max_size=200),
    st.lists(
        st.sampled_from([b"t=", b"v1=", b"v0=", b",", b"=", b"1800000000", b"a" * 64, b" ", b"\xff"]),
        max_size=12,
    ).map(b"".join),
)


@given(HEADER_LIKE, st.binary(max_size=100))
@example(signed().encode(), BODY.encode())
@settings(max_examples=500)
def test_whatever_is_believed_stripe_believes_too(header: bytes, body: bytes) -> None:
    if refusal(header, body=body) is None:
        assert stripe_believes(body, header.decode("latin-1"), SECRET)


def test_a_body_that_is_no_text_is_judged_as_bytes() -> None:
    assert refusal(signed(), body=b"\xff\xfe") == "signature_invalid"


def test_real_time_is_what_stripe_uses() -> None:
    header = stripe.WebhookSignature.generate_signature_header(BODY, SECRET)
    assert refusal(header, now_s=time.time()) is None
