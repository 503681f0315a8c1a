"""A registry: ids to released schemas and back, by the client that others use, whatever the registry does."""

from __future__ import annotations

import datetime
import ipaddress
import json
import logging
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from confluent_kafka.schema_registry import Schema as RegistrySchema
from confluent_kafka.schema_registry import SchemaRegistryClient, SchemaRegistryError
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.serialization import MessageField, SerializationContext
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from schemas.catalog import ROOT, current, released
from services.wire.codec import Decoder
from services.wire.errors import Misconfigured, Transient, UnknownSchema
from services.wire.registry import Registry, decoder_for, encoder_for
from services.wire.settings import load_settings
from services.wire.usage import UsageEvent, encode_usage, to_record
from tests.registry_server import MEDIA_TYPE, RegistryServer

USAGE = current("usage_event")
TEXT = (ROOT / "usage_event/v3.avsc").read_text(encoding="utf-8")
SUBJECT = "usage.v3-value"
NOW_US = 1_772_366_400_000_000


@pytest.fixture
def server() -> Iterator[RegistryServer]:
    with RegistryServer() as running:
        yield running


@pytest.fixture
def client(server: RegistryServer) -> SchemaRegistryClient:
    return SchemaRegistryClient({"url": server.url})


# The registry of these tests ----------------------------------------------------------------------------


def error_of(call: Any, *arguments: Any) -> tuple[int, int]:
    with pytest.raises(SchemaRegistryError) as caught:
        call(*arguments)
    return caught.value.http_status_code, caught.value.error_code


def test_confluents_client_registers_looks_up_and_lists(client: SchemaRegistryClient) -> None:
    schema = RegistrySchema(TEXT, "AVRO")
    first = client.register_schema("a-value", schema)
    assert client.register_schema("b-value", schema) == first, "one schema has one id, whatever its subject"
    other = RegistrySchema(json.dumps({"type": "record", "name": "other", "fields": []}), "AVRO")
    second = client.register_schema("c-value", other)
    assert second != first
    assert client.get_subjects() == ["a-value", "b-value", "c-value"]
    assert client.get_versions("a-value") == [1]
    assert json.loads(client.get_schema(first).schema_str) == json.loads(TEXT)
    assert client.lookup_schema("b-value", schema).schema_id == first
    assert client.get_latest_version("a-value").version == client.get_version("a-value", 1).version == 1
    fresh = SchemaRegistryClient({"url": client._conf["url"]})
    assert fresh.register_schema("a-value", schema) == first, "and again"
    assert fresh.get_versions("a-value") == [1]


def test_its_refusals_have_the_codes_of_the_api(client: SchemaRegistryClient) -> None:
    schema = RegistrySchema(TEXT, "AVRO")
    assert error_of(client.get_schema, 7) == (404, 40403)
    assert error_of(client.get_versions, "nobody") == (404, 40401)
    assert error_of(client.lookup_schema, "nobody", schema) == (404, 40401)
    client.register_schema("a-value", schema)
    other = RegistrySchema('{"type": "record", "name": "other", "fields": []}', "AVRO")
    assert error_of(client.lookup_schema, "a-value", other) == (404, 40403)
    assert error_of(client.get_version, "a-value", 2) == (404, 40402)
    assert error_of(client.get_version, "a-value", "two") == (422, 42202)
    assert error_of(client.register_schema, "a-value", RegistrySchema('{"type": "x"}', "AVRO")) == (
        422,
        42201,
    )
    assert error_of(client.register_schema, "a-value", other) == (409, 409)


def test_it_judges_compatibility_as_it_is_told_to(client: SchemaRegistryClient) -> None:
    old = {"type": "record", "name": "r", "fields": [{"name": "a", "type": "int"}]}
    wider = {**old, "fields": [{"name": "a", "type": "long"}]}
    client.register_schema("s", RegistrySchema(json.dumps(old), "AVRO"))
    assert client.get_config().compatibility_level == "BACKWARD"
    assert client.test_compatibility("s", RegistrySchema(json.dumps(wider), "AVRO"))
    client.set_compatibility("s", "FULL")
    assert not client.test_compatibility("s", RegistrySchema(json.dumps(wider), "AVRO"))
    assert error_of(client.register_schema, "s", RegistrySchema(json.dumps(wider), "AVRO")) == (409, 409)
    client.set_compatibility("s", "NONE")
    assert client.get_compatibility("s") == "NONE"
    assert client.register_schema("s", RegistrySchema(json.dumps(wider), "AVRO")) == 2
    assert error_of(client.set_compatibility, "s", "SOMEWHAT") == (422, 42203)


def test_its_answers_have_the_media_type_of_the_api(server: RegistryServer) -> None:
    for path, status in (("/subjects", 200), ("/schemas/ids/9", 404), ("/config", 200), ("/elsewhere", 404)):
        answer = httpx.get(server.url + path)
        assert (answer.status_code, answer.headers["content-type"]) == (status, MEDIA_TYPE)


# Others' records, and ours ------------------------------------------------------------------------------


def test_what_confluents_serializer_writes_is_read_by_us(server: RegistryServer, client: Any) -> None:
    value = AvroSerializer(client, TEXT)(
        {
            "idempotency_key": "evt-1",
            "tenant_id": "acme",
            "customer_ref": "cust-1",
            "meter": "requests",
            "quantity": Decimal("12.5"),
            "occurred_at": datetime.datetime.fromtimestamp(NOW_US / 1e6, datetime.UTC),
            "properties": {"region": "eu-west"},
            "source": "elsewhere",
        },
        SerializationContext("usage.v3", MessageField.VALUE),
    )
    assert server.subjects == {SUBJECT: [1]}
    assert value[:5] == b"\x00\x00\x00\x00\x01"
    schema, record = decoder_for(load_settings(schema_registry_url=server.url)).decode(value)
    assert schema is USAGE
    assert record["occurred_at"] == NOW_US
    assert int.from_bytes(record["quantity"], "big", signed=True) == 12_500_000_000


def test_what_we_write_is_read_by_confluents_deserializer(server: RegistryServer, client: Any) -> None:
    settings = load_settings(schema_registry_url=server.url)
    encoder = encoder_for(settings, USAGE, "usage.v3")
    event = UsageEvent("acme", "cust-1", "requests", Decimal("0.000000001"), "evt-1")
    value = encode_usage(encoder, to_record(event, source="test", now_us=NOW_US))
    read = AvroDeserializer(client)(value, SerializationContext("usage.v3", MessageField.VALUE))
    assert read["quantity"] == Decimal("0.000000001")
    assert read["occurred_at"] is None
    assert encoder_for(settings, USAGE, "usage.v3").prefix == encoder.prefix, "registered once"


def test_a_revision_is_a_compatible_change_for_a_registry_too(server: RegistryServer, client: Any) -> None:
    client.set_compatibility(SUBJECT, "FULL")
    encoder_for(load_settings(schema_registry_url=server.url), USAGE, "usage.v3")
    added = {"name": "region", "type": "string", "default": "", "doc": "Where."}
    document = {**USAGE.document, "fields": [*USAGE.document["fields"], added]}
    assert client.register_schema(SUBJECT, RegistrySchema(json.dumps(document), "AVRO")) == 2


# What a registry may hold -------------------------------------------------------------------------------


def test_an_id_is_asked_for_once(server: RegistryServer) -> None:
    number = server.register(SUBJECT, TEXT)
    registry = Registry(server.url)
    assert {registry.schema_of(number) for _ in range(5)} == {USAGE}
    assert len(server.asked) == 1


def test_older_versions_are_found_by_their_ids_too(server: RegistryServer) -> None:
    first = released()["usage_event", 1]
    assert Registry(server.url).schema_of(server.register("usage.v1-value", first.document)) is first


def test_a_copy_without_docs_is_the_same_schema(server: RegistryServer) -> None:
    def bare(node: Any) -> Any:
        if isinstance(node, list):
            return [bare(part) for part in node]
        return {k: bare(v) for k, v in node.items() if k != "doc"} if isinstance(node, dict) else node

    assert Registry(server.url).schema_of(server.register(SUBJECT, bare(USAGE.document))) is USAGE


def millis() -> dict[str, Any]:
    document = json.loads(TEXT)
    at = next(one for one in document["fields"] if one["name"] == "occurred_at")
    at["type"][1]["logicalType"] = "timestamp-millis"
    return dict(document)


@pytest.mark.parametrize(
    ("document", "kind"),
    [
        ({"type": "record", "name": "other", "fields": []}, "AVRO"),
        ("string", "AVRO"),
        ({"type": "no such type"}, "AVRO"),
        (millis(), "AVRO"),
        ("syntax = 'proto3';", "PROTOBUF"),
        (TEXT, "JSON"),
    ],
    ids=["another record", "no record", "no Avro", "milliseconds", "Protobuf", "JSON Schema"],
)
def test_a_schema_that_is_not_released_here_is_unknown(
    server: RegistryServer, document: Any, kind: str
) -> None:
    server.schemas[1] = (json.dumps(document) if kind == "AVRO" else document, kind)
    with pytest.raises(UnknownSchema):
        Registry(server.url).schema_of(1)


def test_an_id_that_the_registry_does_not_have_is_unknown(server: RegistryServer) -> None:
    with pytest.raises(UnknownSchema, match="no schema 7"):
        Registry(server.url).schema_of(7)


# What a registry may do ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, b'{"error_code": 50001, "message": "store"}'),
        (503, b"<html>busy</html>"),
        (429, b""),
        (404, b"<html>no such page</html>"),
        (404, b'{"error_code": 404, "message": "HTTP 404 Not Found"}'),
        (401, b'{"error_code": 401, "message": "Unauthorized"}'),
        (200, b"<html>log in here</html>"),
        (200, b""),
        (200, b"[]"),
        (200, b"{}"),
        (200, b'{"schema": 5}'),
        (200, b'{"schema": "{\\"type\\": "}'),
        (200, b'{"schema": null}'),
    ],
)
def test_whatever_else_it_answers_is_waited_for_and_forgotten(
    server: RegistryServer, status: int, body: bytes
) -> None:
    number = server.register(SUBJECT, TEXT)
    registry = Registry(server.url)
    server.answer_with = (status, body)
    for _ in range(2):
        with pytest.raises(Transient):
            registry.schema_of(number)
    server.answer_with = None
    assert registry.schema_of(number) is USAGE


def test_a_registry_that_is_away_is_waited_for_and_a_known_id_needs_none(server: RegistryServer) -> None:
    known, later = (
        server.register(SUBJECT, TEXT),
        server.register("v1", released()["usage_event", 1].document),
    )
    registry = Registry(server.url)
    registry.schema_of(known)
    server.stop()
    assert registry.schema_of(known) is USAGE
    with pytest.raises(Transient):
        registry.schema_of(later)
    with pytest.raises(Transient):
        registry.id_of(USAGE, "usage.v3")
    server.start()
    assert registry.schema_of(later) is released()["usage_event", 1]
    assert registry.id_of(USAGE, "usage.v3") == known


def test_a_decoder_tells_a_registry_that_is_away_from_an_unknown_schema(server: RegistryServer) -> None:
    decoder = Decoder(Registry(server.url).schema_of)
    with pytest.raises(UnknownSchema):
        decoder.decode(b"\x00\x00\x00\x00\x07")
    server.stop()
    with pytest.raises(Transient):
        decoder.decode(b"\x00\x00\x00\x00\x07")


def test_a_schema_that_the_registry_refuses_is_for_an_operator(server: RegistryServer) -> None:
    server.register(SUBJECT, {"type": "record", "name": "other", "fields": []})
    with pytest.raises(Misconfigured, match=r"refuses usage_event/3 under usage\.v3-value \(409\)"):
        Registry(server.url).id_of(USAGE, "usage.v3")


# Credentials and TLS ------------------------------------------------------------------------------------


def test_credentials_in_the_address_are_sent_and_never_told(caplog: pytest.LogCaptureFixture) -> None:
    with RegistryServer(credentials="meter:pl@nted:s3cret") as server:
        number = server.register(SUBJECT, TEXT)
        address = server.url.replace("://", "://meter:pl%40nted%3As3cret@")
        settings = load_settings(schema_registry_url=address)
        with caplog.at_level(logging.DEBUG):
            assert decoder_for(settings)._schema_ids(number) is USAGE
            assert encoder_for(settings, USAGE, "usage.v3").prefix[-1] == number
            server.stop()
            with pytest.raises(Transient) as away:
                encoder_for(settings, USAGE, "usage.v3")
    told = f"{caplog.text} {settings!r} {settings.model_dump_json()} {away.value} {away.value.__cause__!r}"
    assert "nted" not in told


def test_wrong_credentials_stop_a_writer_and_are_waited_for_by_a_reader() -> None:
    with RegistryServer(credentials="meter:right") as server:
        registry = Registry(server.url.replace("://", "://meter:planted@"))
        with pytest.raises(Misconfigured, match="refuses the credentials") as refused:
            registry.id_of(USAGE, "usage.v3")
        with pytest.raises(Transient, match="answers 401"):
            registry.schema_of(1)
    assert "planted" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["registry:8081", "ftp://u:planted@host", "http://", "http://u:planted@host:port", ""]
)
def test_an_address_that_is_none_is_refused_without_being_repeated(url: str) -> None:
    with pytest.raises(Misconfigured, match="TIDEMETER_SCHEMA_REGISTRY_URL") as refused:
        Registry(url)
    assert "planted" not in str(refused.value)


def test_the_second_of_two_registries_is_asked_when_the_first_is_away(server: RegistryServer) -> None:
    number = server.register(SUBJECT, TEXT)
    assert Registry(f"http://127.0.0.1:9, {server.url}").schema_of(number) is USAGE


def test_a_registry_behind_tls_is_trusted_by_its_own_authority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = self_signed(tmp_path)
    with RegistryServer(certificate=certificate) as server:
        number = server.register(SUBJECT, TEXT)
        with pytest.raises(Transient):
            Registry(server.url).schema_of(number)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert Registry(server.url).schema_of(number) is USAGE


def self_signed(directory: Path) -> Path:
    """A certificate of 127.0.0.1 with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "registry")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    path = directory / "registry.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path
