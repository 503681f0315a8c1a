"""Rows and topic records of adjustments and conflicts."""

from __future__ import annotations

import json
import uuid
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import psycopg

from schemas.catalog import current
from services.counters.prepare import SERVICE
from services.streaming.chunks import Chunk
from services.streaming.parking import ParkedRow
from services.wire import topics
from services.wire.codec import Encoder
from services.wire.periods import hour_start
from services.wire.records import OutboxRow, Source, error_headers, header_texts, ops_event
from services.wire.times import instant
from services.wire.usage import QUANTITY_UNIT, record_key

if TYPE_CHECKING:
    from services.counters.ledger import FirstSeen, TooLate
    from services.counters.prepare import Event


def adjustment_row(db: psycopg.Connection[Any], chunk: Chunk, one: TooLate) -> OutboxRow:
    """Store an adjustment, pending or already carried forward, and return its record for the topic."""
    index, event_id, _, item, occurred, amount, key = one.event
    raw, meter, tp = chunk.records[index], item.meter, chunk.partition
    arrived = raw.timestamp * 1000
    watermark = max(one.watermark, 0)
    policy = "carry_forward" if one.carried else "manual"
    is_unique = meter.aggregation == "unique"
    quantity = QUANTITY_UNIT if is_unique else amount
    applied_hour = instant(hour_start(one.counted_us)) if one.carried else None
    counted_at = instant(one.counted_us) if one.carried else None
    db.execute(
        "INSERT INTO adjustments "
        "(adjustment_id, item_id, tenant_id, customer_ref, meter, idempotency_key, quantity, unique_value, "
        "occurred_at, arrived_at, watermark, policy, reason, state, applied_hour, counted_at, applied_at, "
        'topic, partition, "offset") '
        "VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s) "
        "ON CONFLICT DO NOTHING",
        (
            uuid.UUID(bytes=event_id),
            uuid.UUID(bytes=item.item_id),
            meter.tenant_id,
            item.customer_ref,
            meter.meter,
            key,
            Decimal(quantity) / QUANTITY_UNIT,
            uuid.UUID(int=amount) if is_unique else None,
            instant(occurred),
            instant(arrived),
            instant(watermark),
            policy,
            "beyond_retention" if one.resend else "too_late",
            "applied" if one.carried else "pending",
            applied_hour,
            counted_at,
            instant(arrived) if one.carried else None,
            tp.topic,
            tp.partition,
            raw.offset,
        ),
    )
    encoder = Encoder(current("adjustment"))
    value = encoder.encode(
        {
            "adjustment_id": event_id.hex(),
            "tenant_id": meter.tenant_id,
            "customer_ref": item.customer_ref,
            "meter": meter.meter,
            "idempotency_key": key,
            "quantity": quantity.to_bytes(16, "big", signed=True),
            "occurred_at": occurred,
            "arrived_at": arrived,
            "watermark": watermark,
            "policy": policy,
            "topic": tp.topic,
            "partition": tp.partition,
            "offset": raw.offset,
        }
    )
    return OutboxRow(
        topics.ADJUSTMENTS,
        record_key(meter.tenant_id, item.customer_ref, meter.meter),
        value,
        encoder.header_texts,
    )


def conflict_to_park(chunk: Chunk, event: Event) -> ParkedRow:
    """What is kept of a record whose key was counted with other content."""
    index, _, _, item, _, _, key = event
    raw, tp = chunk.records[index], chunk.partition
    return ParkedRow(
        kind="conflict",
        topic=tp.topic,
        partition=tp.partition,
        offset=raw.offset,
        arrived_at=instant(raw.timestamp * 1000),
        reason="conflict",
        stage="count",
        error_class="",
        value=raw.value or b"",
        headers=header_texts(raw.headers),
        tenant_id=item.meter.tenant_id,
        meter=item.meter.meter,
        event_id=key,
    )


def conflict_rows(chunk: Chunk, event: Event, first: FirstSeen, now_us: int) -> list[OutboxRow]:
    """The record of a conflict for its topic, and its ops event."""
    index, event_id, digest, item, _, _, key = event
    raw, tp, tenant_id = chunk.records[index], chunk.partition, item.meter.tenant_id
    encoder = Encoder(current("conflict"))
    value = encoder.encode(
        {
            "tenant_id": tenant_id,
            "idempotency_key": key,
            "first_topic": topics.USAGE_TOPICS[first.version],
            "first_partition": first.partition,
            "first_offset": first.offset,
            "first_digest": first.digest.to_bytes(8, "big", signed=True),
            "second_topic": tp.topic,
            "second_partition": tp.partition,
            "second_offset": raw.offset,
            "second_digest": digest.to_bytes(8, "big", signed=True),
            "second_record": raw.value or b"",
            "detected_at": now_us,
        }
    )
    source = Source(tp.topic, tp.partition, raw.offset, raw.timestamp)
    why = error_headers(source, reason="conflict", stage="count", error_class="", service=SERVICE)
    record = OutboxRow(
        topics.CONFLICTS,
        json.dumps([tenant_id, key], separators=(",", ":")).encode(),
        value,
        {**encoder.header_texts, **why},
    )
    alarm = ops_event(
        "usage_conflict",
        subject_type="usage_record",
        subject_id=f"{tp.topic}/{tp.partition}/{raw.offset}",
        source="counters",
        at_us=now_us,
        attributes={"event_id_hash": event_id.hex(), "tenant": tenant_id, "meter": item.meter.meter},
    )
    return [record, alarm]
