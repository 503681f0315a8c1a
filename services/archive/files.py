"""The archive's form and its reader: Avro container files below a root that any fsspec URL may name.

``<root>/<topic>/<partition>/<first offset>-<last offset>.avro``, both with 20 digits and both inclusive. A
file holds every record that the log had in that run, byte for byte; offsets inside may be sparse, because a
log has some without a record (markers of transactions). The next file begins at the last offset plus one.
What is between two files otherwise is a hole: records that nobody archived.

The header says what the name says, how many records there are, and a digest of all of it, so a file that was
cut, changed, renamed or put elsewhere is refused by its name. No record of it is given out before that.

Raises ``NotHeld``, ``DamagedFile``, and ``StorageAway`` when the storage does not answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import fastavro
from fastavro.schema import parse_schema, to_parsing_canonical_form
from fastavro.write import Writer
from fsspec.core import url_to_fs

from services.streaming.chunks import Partition, RawRecord
from services.wire.errors import Misconfigured, TidemeterError, Transient

#: A Kafka header may have no value; that is kept, like everything else.
SCHEMA: Final = {
    "type": "record",
    "name": "archived_record",
    "doc": "A record of a Kafka log as it was read. timestamp: its arrival, milliseconds since 1970.",
    "fields": [
        {"name": "offset", "type": "long"},
        {"name": "timestamp", "type": "long"},
        {"name": "key", "type": ["null", "bytes"]},
        {"name": "value", "type": ["null", "bytes"]},
        {
            "name": "headers",
            "type": {
                "type": "array",
                "items": {
                    "type": "record",
                    "name": "header",
                    "fields": [
                        {"name": "name", "type": "string"},
                        {"name": "value", "type": ["null", "bytes"]},
                    ],
                },
            },
        },
    ],
}
#: Bytes of keys, values and headers from which a file is cut, whatever its number of records.
FILE_BYTES: Final = 32 * 1024 * 1024
BATCH_RECORDS: Final = 5000
_SCHEMA = parse_schema(SCHEMA)
_CANONICAL = to_parsing_canonical_form(_SCHEMA)
_BLOCK_BYTES = 256 * 1024
_SYNC_BYTES = 16
#: More than any header of ours has.
_HEADER_BYTES_MAX = 16 * 1024
#: A directory that changes while it is listed is listed again so often.
_LISTINGS_MAX = 5
_DIGEST = "tidemeter.digest"
_NAME = re.compile(r"([0-9]{20})-([0-9]{20})\.avro")


class NotHeld(TidemeterError):
    """Offsets that were asked for are not in the archive. The message names the partition and the hole."""


class DamagedFile(TidemeterError):
    """A file is not what was written. The message names it."""


class StorageAway(Transient):
    """The archive's storage does not answer, or refuses."""


@dataclass(frozen=True, slots=True)
class ArchivedRecord:
    """A record as it was read from the log: a ``RawRecord``. A header without a value has None there."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True, order=True)
class File:
    """A file by its name."""

    first: int
    last: int
    path: str
    size: int

    @property
    def next(self) -> int:
        return self.last + 1


@dataclass(frozen=True, slots=True)
class Run:
    """Files that adjoin. ``next_offset`` is the one after the last; arrivals are milliseconds since 1970."""

    first_offset: int
    next_offset: int
    files: int
    bytes: int
    first_arrival: int
    last_arrival: int


class FileBuilder:
    """Compresses records into a file's blocks as they come; :meth:`finish` puts the header in front."""

    def __init__(self, tp: Partition) -> None:
        self._tp = tp
        self._sync = os.urandom(_SYNC_BYTES)
        self._blocks = io.BytesIO()
        self._writer = self._new_writer(self._blocks, {})
        self._blocks_at = self._blocks.tell()
        self._first_arrival = self._last_arrival = 0
        self.last_offset = -1
        self.records = 0
        self.payload_bytes = 0

    def _new_writer(self, stream: io.BytesIO, metadata: Mapping[str, str]) -> Any:
        return Writer(
            stream,
            _SCHEMA,
            codec="deflate",
            sync_interval=_BLOCK_BYTES,
            metadata=dict(metadata),
            sync_marker=self._sync,
        )

    def add(self, record: RawRecord) -> None:
        """The next record; its offset is above all before."""
        headers = [{"name": name, "value": value} for name, value in record.headers]
        self._writer.write(
            {
                "offset": record.offset,
                "timestamp": record.timestamp,
                "key": record.key,
                "value": record.value,
                "headers": headers,
            }
        )
        if not self.records:
            self._first_arrival = record.timestamp
        self._last_arrival = record.timestamp
        self.last_offset = record.offset
        self.records += 1
        self.payload_bytes += len(record.key or b"") + len(record.value or b"")
        self.payload_bytes += sum(len(name) + len(value or b"") for name, value in record.headers)

    def finish(self, first: int, last: int) -> tuple[bytes, memoryview]:
        """Header and blocks of the file, for the run from ``first`` to ``last``."""
        self._writer.flush()
        metadata = {
            "tidemeter.topic": self._tp.topic,
            "tidemeter.partition": str(self._tp.partition),
            "tidemeter.first_offset": str(first),
            "tidemeter.last_offset": str(last),
            "tidemeter.records": str(self.records),
            "tidemeter.first_arrival": str(self._first_arrival),
            "tidemeter.last_arrival": str(self._last_arrival),
        }
        blocks = self._blocks.getbuffer()[self._blocks_at :]
        header = io.BytesIO()
        self._new_writer(header, {**metadata, _DIGEST: _digest(metadata, blocks)})
        return header.getvalue(), blocks


def _digest(metadata: Mapping[str, str], blocks: bytes | memoryview) -> str:
    digest = hashlib.blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=20)
    digest.update(blocks)
    return digest.hexdigest()


def file_name(first: int, last: int) -> str:
    """Of the run from ``first`` to ``last``."""
    return f"{first:020}-{last:020}.avro"


def hole_name(first: int) -> str:
    """Of the file that says that an operator has accepted the hole that begins at ``first``."""
    return f"{first:020}.hole"


class Archive:
    """Reads the archive at ``url``: a plain path, or what fsspec knows, such as ``s3://bucket/prefix``."""

    def __init__(self, url: str) -> None:
        """Touches no storage yet.

        Raises:
            Misconfigured: fsspec does not know the URL, or what it needs for it is not installed.
        """
        try:
            self.fs, root = url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            raise Misconfigured(
                f"the archive's storage needs a package that is not installed: {error}"
            ) from error
        except ValueError as error:
            raise Misconfigured(f"TIDEMETER_ARCHIVE_URL: {error}") from error
        self.root = str(root).rstrip("/")

    # -- What is there -------------------------------------------------------------------------------

    def directory(self, tp: Partition) -> str:
        """Where the files of a partition are."""
        return f"{self.root}/{tp.topic}/{tp.partition}"

    def partitions(self, topics: Iterable[str]) -> list[Partition]:
        """Those of ``topics`` that have a directory here."""
        return [
            Partition(topic, number)
            for topic in topics
            for number in sorted(
                int(name) for name, _ in self.listed(f"{self.root}/{topic}") if name.isdecimal()
            )
        ]

    def files(self, tp: Partition) -> list[File]:
        """The files of a partition, ascending.

        Raises:
            DamagedFile: a name says nothing.
        """
        found = []
        for name, size in self.listed(self.directory(tp)):
            if not name.endswith(".avro"):
                continue
            path = f"{self.directory(tp)}/{name}"
            match = _NAME.fullmatch(name)
            if match is None or int(match[1]) > int(match[2]):
                raise DamagedFile(f"{path}: the name is not of the form first-last.avro")
            found.append(File(int(match[1]), int(match[2]), path, size))
        return sorted(found)

    def held(self, tp: Partition) -> list[tuple[int, int]]:
        """Runs [from, to) of offsets, ascending; files that adjoin are one run."""
        return [(run[0].first, max(file.next for file in run)) for run in self._runs(tp)]

    def runs(self, tp: Partition) -> list[Run]:
        """The same with what an operator wants to know; reads the first and the last header of each."""
        found = []
        for files in self._runs(tp):
            newest = max(files, key=lambda file: file.last)
            found.append(
                Run(
                    files[0].first,
                    newest.next,
                    len(files),
                    sum(file.size for file in files),
                    self._arrival(files[0], "tidemeter.first_arrival"),
                    self._arrival(newest, "tidemeter.last_arrival"),
                )
            )
        return found

    def first_arrival(self, tp: Partition) -> int | None:
        """When the oldest record that is kept arrived, milliseconds since 1970; None when there is none."""
        files = self.files(tp)
        return self._arrival(files[0], "tidemeter.first_arrival") if files else None

    def _runs(self, tp: Partition) -> list[list[File]]:
        runs: list[list[File]] = []
        end = -1
        for file in self.files(tp):
            if file.first > end or not runs:
                runs.append([])
            runs[-1].append(file)
            end = max(end, file.next)
        return runs

    def listed(self, directory: str) -> list[tuple[str, int]]:
        """Names and sizes of what is in a directory; nothing when it does not exist."""
        for _ in range(_LISTINGS_MAX):
            with asked_of_storage():
                try:
                    entries = self.fs.ls(directory, detail=True)
                except FileNotFoundError:  # of the directory, or of a file that went away meanwhile
                    if not self.exists(directory):
                        return []
                    continue
            return [(entry["name"].rstrip("/").rpartition("/")[2], entry["size"] or 0) for entry in entries]
        raise StorageAway(f"{directory} changes while it is listed")

    def exists(self, path: str) -> bool:
        """Is there such a file or directory? Unlike fsspec's own answer, never no for want of an answer."""
        with asked_of_storage():
            try:
                self.fs.info(path)
            except FileNotFoundError:
                return False
        return True

    # -- Reading -------------------------------------------------------------------------------------

    def read(self, tp: Partition, start: int, end: int) -> Iterator[Sequence[ArchivedRecord]]:
        """Every record with start <= offset < end, in offset order, in batches.

        One file is in memory at a time. Where files overlap, a record still comes once.

        Raises:
            NotHeld: not all of [start, end) is held; before any record.
            DamagedFile: while reading; nothing of that file has come.
        """
        chosen, at = [], start
        for file in self.files(tp):
            if at >= end or file.first > at:
                break
            if file.next > at:
                chosen.append(file)
                at = file.next
        if at < end:
            behind = [run[0] for run in self.held(tp) if run[0] > at]
            until = min([*behind, end])
            raise NotHeld(f"{tp.topic}/{tp.partition}: offsets {at} to {until - 1} are not in the archive")
        return self._read(tp, chosen, start, end)

    def _read(
        self, tp: Partition, files: Sequence[File], at: int, end: int
    ) -> Iterator[Sequence[ArchivedRecord]]:
        for file in files:
            batch: list[ArchivedRecord] = []
            for record in self._records(tp, file):
                if at <= record.offset < end:
                    batch.append(record)
                    if len(batch) == BATCH_RECORDS:
                        yield batch
                        batch = []
            if batch:
                yield batch
            at = file.next

    def _records(self, tp: Partition, file: File) -> Iterator[ArchivedRecord]:
        """Of one file, after it has been compared with its name and its digest."""
        reader, records = self._open(tp, file)
        before, count = file.first - 1, 0
        with _as_damage(file):
            for found in reader:
                offset = found["offset"]
                if not before < offset <= file.last:
                    raise DamagedFile(f"{file.path}: offset {offset} comes after {before}")
                before, count = offset, count + 1
                yield ArchivedRecord(
                    offset,
                    found["timestamp"],
                    found["key"],
                    found["value"],
                    tuple((header["name"], header["value"]) for header in found["headers"]),
                )
        if count != records:
            raise DamagedFile(f"{file.path}: {count} records where the header says {records}")

    def _open(self, tp: Partition, file: File) -> tuple[Any, int]:
        """A reader of the blocks, and how many records there must be."""
        with asked_of_storage():
            try:
                stream = io.BytesIO(self.fs.cat_file(file.path))
            except FileNotFoundError:
                raise NotHeld(f"{file.path} went away while the archive was read") from None
        with _as_damage(file):
            reader = fastavro.reader(stream)
            said = {name: text for name, text in reader.metadata.items() if name[:5] != "avro."}
            digest = said.pop(_DIGEST, None)
            if digest != _digest(said, stream.getbuffer()[stream.tell() :]):
                raise DamagedFile(f"{file.path}: the digest does not fit the content")
            if to_parsing_canonical_form(reader.writer_schema) != _CANONICAL or reader.codec != "deflate":
                raise DamagedFile(f"{file.path}: another schema or codec")
            expected = (tp.topic, tp.partition, file.first, file.last)
            named = (
                said["tidemeter.topic"],
                int(said["tidemeter.partition"]),
                int(said["tidemeter.first_offset"]),
                int(said["tidemeter.last_offset"]),
            )
            if named != expected:
                raise DamagedFile(f"{file.path}: the header is of another partition or run")
            return reader, int(said["tidemeter.records"])

    def _arrival(self, file: File, name: str) -> int:
        """From the header alone."""
        with asked_of_storage():
            try:
                start = self.fs.cat_file(file.path, start=0, end=_HEADER_BYTES_MAX)
            except FileNotFoundError:
                raise NotHeld(f"{file.path} went away while the archive was read") from None
        with _as_damage(file):
            return int(fastavro.reader(io.BytesIO(start)).metadata[name])


@contextlib.contextmanager
def asked_of_storage() -> Iterator[None]:
    """Whatever a storage raises means that it gave no answer: each has exceptions of its own."""
    try:
        yield
    except TidemeterError:
        raise
    except Exception as error:
        raise StorageAway(f"the archive's storage does not answer ({type(error).__name__})") from error


@contextlib.contextmanager
def _as_damage(file: File) -> Iterator[None]:
    """Whatever a decoder raises means that the bytes are not what was written."""
    try:
        yield
    except TidemeterError:
        raise
    except Exception as error:
        raise DamagedFile(f"{file.path}: cannot be read ({type(error).__name__})") from error
