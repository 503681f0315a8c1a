"""The codes of Stripe's asynchronous error reports that this service gives, and what a call says instead.

From docs.stripe.com/billing/subscriptions/usage-based/recording-usage-api and the enum of stripe-python 16.1;
`meter_event_value_not_found` is in the first only. The two codes about dimensions are not simulated.
"""

from __future__ import annotations

NO_METER = "no_meter"
ARCHIVED_METER = "archived_meter"
IN_PAST, IN_FUTURE = "timestamp_too_far_in_past", "timestamp_in_future"
NO_CUSTOMER, CUSTOMER_NOT_FOUND = "meter_event_no_customer_defined", "meter_event_customer_not_found"
NO_VALUE, BAD_VALUE = "meter_event_value_not_found", "meter_event_invalid_value"
TOO_MANY_DIGITS = "meter_event_value_too_many_digits"

CODES = frozenset(
    {
        NO_METER,
        ARCHIVED_METER,
        IN_PAST,
        IN_FUTURE,
        NO_CUSTOMER,
        CUSTOMER_NOT_FOUND,
        NO_VALUE,
        BAD_VALUE,
        TOO_MANY_DIGITS,
    }
)
#: v1 refusals carry a code only where an object is missing; other codes were not observed there.
CODES_V1 = {NO_METER: "resource_missing", CUSTOMER_NOT_FOUND: "resource_missing"}
#: What POST /v2/billing/meter_events declares. A missing customer and a timestamp out of range are not among
#: its errors: the first is reported later, the second refused under its asynchronous code, by our choice.
CODES_V2 = {
    NO_METER: "no_meter",
    ARCHIVED_METER: "archived_meter",
    NO_CUSTOMER: "payload_no_customer_defined",
    NO_VALUE: "payload_no_value_defined",
    BAD_VALUE: "payload_invalid_value",
    TOO_MANY_DIGITS: "payload_invalid_value",
    IN_PAST: IN_PAST,
    IN_FUTURE: IN_FUTURE,
}
