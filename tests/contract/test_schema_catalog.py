"""Released schemas: locked, documented, distinguishable, and readable by anybody's Avro library."""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import fastavro
import pytest
from fastavro.schema import fingerprint, to_parsing_canonical_form

from schemas import catalog
from schemas.catalog import CURRENT_VERSIONS, ROOT, CatalogError, Schema, check_catalog, current, released
from services.wire.codec import SINGLE_OBJECT_PREFIX_BYTES, Decoder, Encoder
from services.wire.topics import USAGE_TOPICS
from upcasters.chain import upcasters

EVERY = sorted(released().values(), key=lambda schema: schema.name)
CORPUS = sorted(ROOT.glob("*/corpus/*.avro"))


def fields_of(node: Any) -> Iterator[dict[str, Any]]:
    """Every field of every record in a schema document."""
    if isinstance(node, list):
        for part in node:
            yield from fields_of(part)
    elif isinstance(node, dict):
        yield from node.get("fields", ())
        for part in node.values():
            yield from fields_of(part)


def types_of(node: Any) -> Iterator[str]:
    """Every type name that a schema document mentions."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, list):
        for part in node:
            yield from types_of(part)
    elif isinstance(node, dict):
        yield from types_of(node["type"])
        for part in (*node.get("fields", ()), node.get("items"), node.get("values")):
            if part is not None:
                yield from types_of(part)


def crc_64_avro(text: str) -> bytes:
    """The specification's own algorithm, bit by bit, as it stands on the wire (little-endian)."""
    empty = 0xC15D213AA4D7A795
    value = empty
    for byte in text.encode():
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (empty & -(value & 1))
    return value.to_bytes(8, "little")


def ids(schema: Schema) -> str:
    return schema.name


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of ``schemas/`` that may be damaged."""
    root = tmp_path / "schemas"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(catalog, "ROOT", root)
    monkeypatch.setattr(catalog, "LOCK_FILE", root / "LOCK")
    for name in ("writers", "released"):
        monkeypatch.setattr(catalog, name, getattr(catalog, name).__wrapped__)  # without the cache
    return root


def test_the_released_files_are_what_the_lock_says() -> None:
    check_catalog()


@pytest.mark.parametrize(
    "name", ["usage_event/v1.avsc", "usage_event/corpus/v2-release-0.2.avro", "postgres/0001.initial.sql"]
)
def test_an_edit_of_a_released_file_is_refused_at_start(copied: Path, name: str) -> None:
    path = copied / name
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(CatalogError, match="LOCK"):
        check_catalog()


def test_an_edited_or_removed_file_cannot_be_locked_again(copied: Path) -> None:
    (copied / "usage_event/v1.avsc").unlink()
    with pytest.raises(CatalogError, match=r"usage_event/v1\.avsc"):
        catalog.write_lock()


def test_a_new_file_can_be_locked(copied: Path) -> None:
    (copied / "usage_event/corpus/v3-release-0.4.avro").write_bytes(b"more")
    with pytest.raises(CatalogError):
        check_catalog()
    catalog.write_lock()
    check_catalog()


def test_a_version_that_was_removed_is_missed(copied: Path) -> None:
    (copied / "usage_event/v2.avsc").unlink()
    with pytest.raises(CatalogError, match="schemas/usage_event: version 2 is missing"):
        check_catalog()


def test_milliseconds_turned_into_microseconds_keep_the_fingerprint_and_are_refused(copied: Path) -> None:
    """The trap: Avro's canonical form forgets logical types, so old values would be read a thousandfold."""
    document = json.loads((copied / "usage_event/v2.avsc").read_text())
    millis = copy.deepcopy(document)
    used_at = next(field for field in millis["fields"] if field["name"] == "used_at")
    used_at["type"]["logicalType"] = "timestamp-millis"
    assert to_parsing_canonical_form(millis) == to_parsing_canonical_form(document)

    (copied / "usage_event/v4.avsc").write_text(json.dumps(millis))
    with pytest.raises(CatalogError, match="usage_event/4 and usage_event/2 have the same fingerprint"):
        check_catalog()


def test_a_version_above_the_current_one_is_unfinished_and_refused(copied: Path) -> None:
    document = json.loads((copied / "usage_event/v3.avsc").read_text())
    document["fields"][0]["name"] = "event_key"
    (copied / "usage_event/v4.avsc").write_text(json.dumps(document))
    with pytest.raises(CatalogError, match="usage_event/4 is above the current version 3"):
        check_catalog()


def test_a_file_that_names_no_version_is_refused(copied: Path) -> None:
    (copied / "usage_event/v3.01.avsc").write_text("{}")
    with pytest.raises(CatalogError, match=r"v3\.01\.avsc: name it"):
        check_catalog()


def test_no_two_released_schemas_share_a_fingerprint() -> None:
    assert len({schema.fingerprint for schema in EVERY}) == len(EVERY)


@pytest.mark.parametrize("schema", EVERY, ids=ids)
def test_fingerprints_are_those_of_the_specification(schema: Schema) -> None:
    document = json.loads(schema.path.read_text())
    assert schema.fingerprint == crc_64_avro(to_parsing_canonical_form(document))
    assert schema.fingerprint.hex() == fingerprint(to_parsing_canonical_form(document), "CRC-64-AVRO")


@pytest.mark.parametrize("schema", EVERY, ids=ids)
def test_every_record_and_every_field_says_what_it_is(schema: Schema) -> None:
    document = json.loads(schema.path.read_text())
    assert document["doc"].strip()
    undocumented = [field["name"] for field in fields_of(document) if not field.get("doc", "").strip()]
    assert not undocumented


@pytest.mark.parametrize("schema", EVERY, ids=ids)
def test_no_schema_is_recursive_and_every_collection_holds_something(schema: Schema) -> None:
    """A recursive value can exhaust the stack, and an array of nothing can claim any length in five bytes."""
    document = json.loads(schema.path.read_text())
    known = {"string", "bytes", "int", "long", "double", "null", "record", "array", "map", "fixed", "enum"}
    assert set(types_of(document)) <= known
    for field in fields_of(document):
        if isinstance(field["type"], dict):
            assert field["type"].get("items") != "null"
            assert field["type"].get("size", 1) > 0


def test_every_version_of_a_usage_event_has_a_topic() -> None:
    assert sorted(USAGE_TOPICS) == list(range(1, CURRENT_VERSIONS["usage_event"] + 1))


def test_a_stock_reader_with_the_published_schema_reads_what_we_write() -> None:
    value = Encoder(current("usage_event")).encode(
        {
            "idempotency_key": "evt-1",
            "tenant_id": "acme",
            "customer_ref": "cust-1",
            "meter": "requests",
            "quantity": (-12_500_000_001).to_bytes(16, "big", signed=True),
            "occurred_at": 1_772_366_400_123_456,
            "properties": {"region": "eu-west"},
            "source": "test",
        }
    )
    assert value[:2] == b"\xc3\x01"
    published = fastavro.parse_schema(json.loads((ROOT / "usage_event/v3.avsc").read_text()))
    body = io.BytesIO(value[SINGLE_OBJECT_PREFIX_BYTES:])
    record = fastavro.schemaless_reader(body, published, None)

    assert body.read() == b""
    assert record["quantity"] == Decimal("-12.500000001")
    assert record["occurred_at"] == datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)


def test_what_a_stock_writer_writes_with_the_published_schema_is_read_by_us() -> None:
    schema = current("usage_event")
    body = io.BytesIO()
    fastavro.schemaless_writer(
        body,
        schema.published,
        {
            "idempotency_key": "evt-1",
            "tenant_id": "acme",
            "customer_ref": "cust-1",
            "meter": "requests",
            "quantity": Decimal("0.000000001"),
            "occurred_at": None,
            "properties": {},
            "source": "other",
        },
    )
    found, record = Decoder().decode(b"\xc3\x01" + schema.fingerprint + body.getvalue())
    assert found is schema
    assert int.from_bytes(record["quantity"], "big", signed=True) == 1
    assert record["occurred_at"] is None


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_every_corpus_record_decodes_and_upcasts_for_ever(path: Path) -> None:
    subject, version = path.parent.parent.name, int(path.name[1 : path.name.index("-")])
    schema, decode, chain = released()[subject, version], Decoder().decode, upcasters()
    with path.open("rb") as stream:
        records = list(fastavro.reader(stream, reader_schema=schema.plain))
    assert records
    for record in records:
        assert decode(Encoder(schema).encode(record)) == (schema, record)
        latest = chain.to_current(subject, version, record)
        assert current(subject) is decode(Encoder(current(subject)).encode(latest))[0]


def test_there_is_a_corpus_of_every_usage_event_version() -> None:
    assert {path.name.split("-")[0] for path in CORPUS} >= {f"v{version}" for version in USAGE_TOPICS}
