"""A chunk: a contiguous run of raw records of one partition, the unit of every transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class RawRecord(Protocol):
    """What a chunk holds: aiokafka's ``ConsumerRecord``, or anything with its attributes."""

    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...  # arrival, milliseconds since 1970
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[tuple[str, bytes]]: ...


class Partition(NamedTuple):
    """A topic partition."""

    topic: str
    partition: int


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Records of one partition in offset order, as fetched: undecoded."""

    partition: Partition
    records: Sequence[RawRecord]

    @property
    def first_offset(self) -> int:
        return self.records[0].offset

    @property
    def next_offset(self) -> int:
        """The offset after the last record."""
        return self.records[-1].offset + 1

    def after(self, next_offset: int) -> Chunk:
        """The part that begins at ``next_offset``; the chunk itself when nothing is below it."""
        if self.first_offset >= next_offset:
            return self
        return Chunk(self.partition, [record for record in self.records if record.offset >= next_offset])

    def until(self, offset: int) -> Chunk:
        """The part before ``offset``."""
        return Chunk(self.partition, [record for record in self.records if record.offset < offset])
