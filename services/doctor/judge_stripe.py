"""Stripe: the key and what it may do, and every declared meter beside Stripe's. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from services.doctor.facts import Configuration, DeclaredMeter, OwnSettings, StripeMeter, StripeSide
from services.doctor.findings import Finding


def judge_own(own: OwnSettings) -> Iterator[Finding]:
    """Our settings of Stripe and of the sink, without asking anybody."""
    if own.sink == "webhook" and not own.sink_webhook_complete:
        yield Finding(
            "sink_webhook_incomplete",
            "TIDEMETER_SINK_WEBHOOK_URL",
            "The sink is a webhook, and its address or its secret is missing or malformed.",
            "Set TIDEMETER_SINK_WEBHOOK_URL and TIDEMETER_SINK_WEBHOOK_SECRET_FILE.",
        )
    if own.key_kind is None:
        if own.sink == "stripe":
            yield Finding(
                "stripe_key_missing",
                "TIDEMETER_STRIPE_API_KEY",
                "There is no Stripe key: nothing is billed.",
                "Set TIDEMETER_STRIPE_API_KEY_FILE to a file with a restricted key.",
            )
    elif own.key_is_live:
        yield from _live(own)
    yield from _webhook_secrets(own)


def _live(own: OwnSettings) -> Iterator[Finding]:
    if not own.live_allowed:
        yield Finding(
            "stripe_live_key_refused",
            "TIDEMETER_STRIPE_ALLOW_LIVE",
            "The Stripe key is a live one, and live keys are not allowed: no process that needs it starts.",
            "Set TIDEMETER_STRIPE_ALLOW_LIVE=true to bill for real, or use a test key.",
        )
    if own.stripe_host is not None and own.stripe_host != "api.stripe.com":
        yield Finding(
            "stripe_live_key_elsewhere",
            "TIDEMETER_STRIPE_API_BASE",
            f"The Stripe key is a live one, and goes to {own.stripe_host} instead of api.stripe.com. The "
            "doctor has not sent it there.",
            "Unset TIDEMETER_STRIPE_API_BASE; if the key was used there, roll it in Stripe's dashboard.",
        )
    if own.key_kind == "sk_live":
        yield Finding(
            "stripe_key_unrestricted",
            "TIDEMETER_STRIPE_API_KEY",
            "The Stripe key is a secret key (sk_live_…): whoever reads it can move money.",
            "Make a restricted key (rk_live_…) with the permissions of docs/operations/doctor.md.",
        )


def _webhook_secrets(own: OwnSettings) -> Iterator[Finding]:
    if own.webhook_secrets == "missing" and not own.bridge_runs:
        yield Finding(
            "webhook_secrets_missing",
            "TIDEMETER_WEBHOOK_SECRETS",
            "No signing secret of a webhook is set: the bridge does not start, so nobody hears of rejected "
            "usage, billing periods and final invoices.",
            "Set TIDEMETER_WEBHOOK_SECRETS_FILE to a file with lines such as main=whsec_….",
        )
    elif own.webhook_secrets not in ("set", "missing"):
        yield Finding(
            "webhook_secrets_invalid",
            "TIDEMETER_WEBHOOK_SECRETS",
            f"The signing secrets of webhooks cannot be used: {own.webhook_secrets}.",
            "Correct TIDEMETER_WEBHOOK_SECRETS, or its file.",
        )


def judge_stripe(stripe: StripeSide) -> Iterator[Finding]:
    """The key as Stripe sees it."""
    answers = stripe.answers
    if any(answer.status == 401 for answer in answers.values()):
        yield Finding(
            "stripe_key_rejected",
            "TIDEMETER_STRIPE_API_KEY",
            "Stripe answers 401: it does not know the key, or it was revoked.",
            "Replace the secret, and restart pusher, dispatcher and upkeep.",
        )
        return
    for need, answer in answers.items():
        if answer.status == 403:
            named = "" if answer.permission is None else f" (Stripe names {answer.permission})"
            yield Finding(
                "stripe_permission_missing",
                need,
                f"The key may not {need}{named}: Stripe answers 403.",
                "Add that permission to the restricted key, in Stripe's dashboard under Developers, API "
                "keys.",
            )
        elif answer.status is None or not 200 <= answer.status < 300:
            said = f"status {answer.status}" if answer.status else answer.reason
            yield Finding(
                "stripe_unchecked",
                need,
                f"Whether the key may {need} is not known: {said}.",
                "Run `tidemeter doctor` again; if it stays, ask Stripe's status page.",
            )
    if stripe.version_answered is not None and stripe.version_answered != stripe.version_asked:
        yield Finding(
            "stripe_api_version",
            "Stripe",
            f"Stripe answers by API version {stripe.version_answered}, and was asked for "
            f"{stripe.version_asked}.",
            "Look for a proxy that changes the header Stripe-Version.",
        )
    if stripe.customers_unknown:
        yield Finding(
            "customers_not_at_stripe",
            "customers",
            f"{stripe.customers_unknown} of {stripe.customers_asked} mapped customers that were asked for do "
            "not exist for this key: they were deleted, or are of another account or mode.",
            "Compare the account and mode of the key with that of the ids in `tidemeter apply -f FILE`.",
        )


def judge_meters(
    meters: Sequence[StripeMeter], configuration: Configuration, own: OwnSettings
) -> Iterator[Finding]:
    """Every declared meter beside Stripe's of its event name; and the mode of both."""
    yield from _mode(meters, configuration, own)
    for declared in configuration.meters:
        named = [meter for meter in meters if meter.event_name == declared.event_name]
        active = [meter for meter in named if meter.is_active]
        if len(active) == 1:
            yield from _compare(declared, active[0])
        else:
            yield _not_one(declared, len(named), len(active))
        if declared.allow_negative:
            yield Finding(
                "meter_negative",
                declared.name,
                f"{declared.name} takes negative values: Stripe bills a period that ends below 0 as 0, and "
                "gives nothing back.",
                "Nothing, if that is meant; else allow_negative: false.",
            )


def _mode(meters: Sequence[StripeMeter], configuration: Configuration, own: OwnSettings) -> Iterator[Finding]:
    live = own.key_is_live
    other = sum(meter.livemode != live for meter in meters)
    events = configuration.testmode_events if live else configuration.livemode_events
    mode, wrong = ("live", "test") if live else ("test", "live")
    if other:
        yield Finding(
            "stripe_mode_differs",
            "Stripe",
            f"The key is of {mode} mode, and {other} of {len(meters)} meters that it shows are of {wrong} "
            "mode.",
            "Use the key of the account and mode that is billed.",
        )
    if events:
        yield Finding(
            "stripe_mode_differs",
            "webhooks",
            f"The key is of {mode} mode, and {events} webhooks of the last 7 days are of {wrong} mode.",
            "Give the endpoint and the key one mode: an endpoint of the other mode does not belong to this "
            "bridge.",
        )


def _not_one(declared: DeclaredMeter, named: int, active: int) -> Finding:
    event_name = declared.event_name
    if active:
        return Finding(
            "meter_ambiguous",
            declared.name,
            f"Stripe has {active} active meters with the event name {event_name}, and {declared.name} means "
            "one.",
            "Archive all but one in Stripe's dashboard.",
        )
    if named:
        return Finding(
            "meter_archived",
            declared.name,
            f"Stripe's meter {event_name} of {declared.name} is archived: its usage waits, and is too old "
            "after 35 days.",
            "Reactivate it in Stripe's dashboard.",
        )
    return Finding(
        "meter_missing",
        declared.name,
        f"Stripe has no meter with the event name {event_name} of {declared.name}: its usage waits, and is "
        "too old after 35 days.",
        "Run `tidemeter apply -f FILE --create-in-stripe`, or correct stripe.event_name.",
    )


def _compare(declared: DeclaredMeter, meter: StripeMeter) -> Iterator[Finding]:
    name, event_name = declared.name, declared.event_name
    if meter.formula != declared.formula:
        yield Finding(
            "meter_formula",
            name,
            f"Stripe's meter {event_name} has the formula {meter.formula}, and {name} needs "
            f"{declared.formula}: Stripe bills another number than was counted.",
            "Make a Stripe meter with that formula and another event name, and declare it as "
            "stripe.event_name.",
        )
    if meter.customer_key != declared.customer_key:
        yield Finding(
            "meter_customer_key",
            name,
            f"Stripe's meter {event_name} finds the customer under {meter.customer_key}, and {name} sends it "
            f"as {declared.customer_key}: every event is refused.",
            f"Declare stripe.customer_key: {meter.customer_key}, with `tidemeter apply -f FILE`.",
        )
    if meter.value_key != declared.value_key:
        yield Finding(
            "meter_value_key",
            name,
            f"Stripe's meter {event_name} finds the value under {meter.value_key}, and {name} sends it as "
            f"{declared.value_key}: every event is refused, or counts nothing.",
            f"Declare stripe.value_key: {meter.value_key}, with `tidemeter apply -f FILE`.",
        )
    if meter.time_window is not None:
        yield Finding(
            "meter_time_window",
            name,
            f"Stripe's meter {event_name} keeps one value of each {meter.time_window} (event_time_window): "
            "totals of hours cannot be compared, and deltas of one window replace each other.",
            "Make a Stripe meter without event_time_window, and declare it as stripe.event_name.",
        )
