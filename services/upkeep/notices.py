"""The notifier's consumer group: ops events that make a mail become notifications, with the position."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime

from services.streaming import offsets
from services.streaming.chunks import RawRecord
from services.streaming.recording import Found, Recorder
from services.upkeep.mails import Notice
from services.wire import groups
from services.wire.codec import Decoder
from services.wire.errors import Undecodable, UnknownSchema
from services.wire.ops import NAME_HEADER
from services.wire.times import instant
from upcasters.chain import InvalidAfterUpcast, MissingUpcaster, UpcasterFailed, Upcasters

GROUP = groups.NOTIFIER

_INSERT = """
    INSERT INTO notifications
        (ops_event_id, name, subject_type, subject_id, source, attributes, happened_at, next_attempt_at)
    SELECT id, name, subject_type, subject_id, source, attributes, happened_at, happened_at
    FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::jsonb[], %s::timestamptz[])
        AS n (id, name, subject_type, subject_id, source, attributes, happened_at)
    ON CONFLICT (ops_event_id) DO NOTHING
    """


class Notices(Recorder[Notice]):
    """The chunk handler. An ops event that was relayed twice is one notification.

    What cannot be read is parked without telling anybody: that would be an ops event about an ops event.
    """

    group = GROUP

    def __init__(self, decoder: Decoder, upcasters: Upcasters, names: frozenset[str]) -> None:
        super().__init__()
        self._decoder = decoder
        self._upcasters = upcasters
        self._names = names

    def read(self, raw: RawRecord) -> Notice | None:
        """What makes a mail; the header says which without decoding.

        Raises:
            Poison: it is no ops event.
        """
        header = dict(raw.headers or ()).get(NAME_HEADER)
        if header is not None and header.decode("utf-8", "replace") not in self._names:
            return None
        try:
            notice = self._notice(raw)
        except (OverflowError, ValueError, ArithmeticError) as error:
            raise Undecodable("invalid_ops_event", type(error).__name__) from None
        except (MissingUpcaster, UpcasterFailed, InvalidAfterUpcast) as error:
            raise Undecodable("upcaster_error", type(error).__name__) from None
        return notice if notice.name in self._names else None

    def _notice(self, raw: RawRecord) -> Notice:
        schema, record = self._decoder.decode(raw.value or b"")
        if schema.subject != "ops_event":
            raise UnknownSchema("unknown_schema", "not an ops_event")
        record = self._upcasters.to_current(schema.subject, schema.version, record)
        return Notice(
            ops_event_id=_storable(record["ops_event_id"]),
            name=_storable(record["name"]),
            subject_type=_storable(record["subject_type"]),
            subject_id=_storable(record["subject_id"]),
            source=_storable(record["source"]),
            attributes={_storable(name): _storable(text) for name, text in record["attributes"].items()},
            happened_at=instant(record["at"]),
        )

    def store(self, db: offsets.Connection, found: Sequence[Found[Notice]], now: datetime) -> None:
        """As notifications."""
        record_notices(db, [one.record for one in found])


def record_notices(db: offsets.Connection, notices: list[Notice]) -> None:
    """Write notifications that are not there yet, in the current transaction."""
    if notices:
        columns = zip(
            *(
                (
                    *(one.ops_event_id, one.name, one.subject_type, one.subject_id, one.source),
                    *(json.dumps(dict(one.attributes)), one.happened_at),
                )
                for one in notices
            ),
            strict=True,
        )
        db.execute(_INSERT, [list(column) for column in columns])


def _storable(text: str) -> str:
    """PostgreSQL holds every text but NUL."""
    return text.replace("\x00", "\\x00")
