"""Confluent Schema Registry, when one is configured: ids to released schemas, and released schemas to ids."""

from __future__ import annotations

import json
from functools import lru_cache

from fastavro.schema import fingerprint, to_parsing_canonical_form

from schemas.catalog import Schema, by_fingerprint
from services.wire.codec import VALUE_BYTES_MAX, Decoder, Encoder
from services.wire.errors import Transient, UnknownSchema
from services.wire.settings import Settings


class Registry:
    """Looks ids up once each. Only schemas released here are accepted, whatever the registry holds."""

    def __init__(self, url: str) -> None:
        # Imported here: it loads an HTTP client that a set-up without a registry does not need.
        from confluent_kafka.schema_registry import SchemaRegistryClient

        self._client = SchemaRegistryClient({"url": url, "timeout": 10})
        self.schema_of = lru_cache(maxsize=1024)(self._schema_of)

    def _schema_of(self, schema_id: int) -> Schema:
        from confluent_kafka.schema_registry import SchemaRegistryError

        try:
            text = self._client.get_schema(schema_id).schema_str
        except SchemaRegistryError as error:
            if error.http_status_code == 404:
                raise UnknownSchema("unknown_schema", f"the registry has no schema {schema_id}") from None
            raise Transient("the schema registry does not answer") from error
        except Exception as error:
            raise Transient("the schema registry does not answer") from error
        try:
            crc = bytes.fromhex(fingerprint(to_parsing_canonical_form(json.loads(text or "")), "CRC-64-AVRO"))
            return by_fingerprint()[crc]
        except Exception:
            raise UnknownSchema("unknown_schema", f"schema {schema_id} is not released here") from None

    def id_of(self, schema: Schema, topic: str) -> int:
        """The id of ``schema`` under the subject ``<topic>-value``; registers it when it is new there.

        Raises:
            Transient: the registry does not answer.
        """
        from confluent_kafka.schema_registry import Schema as RegistrySchema

        text = schema.path.read_text(encoding="utf-8")
        try:
            return int(self._client.register_schema(f"{topic}-value", RegistrySchema(text, "AVRO")))
        except Exception as error:
            raise Transient("the schema registry does not answer") from error


def decoder_for(settings: Settings, *, value_bytes_max: int = VALUE_BYTES_MAX) -> Decoder:
    """A decoder of both framings, or of single-object encoding only without a registry."""
    if settings.schema_registry_url is None:
        return Decoder(value_bytes_max=value_bytes_max)
    return Decoder(Registry(settings.schema_registry_url).schema_of, value_bytes_max=value_bytes_max)


def encoder_for(settings: Settings, schema: Schema, topic: str) -> Encoder:
    """A writer of ``schema`` in the configured framing."""
    if settings.schema_registry_url is None:
        return Encoder(schema)
    return Encoder(schema, Registry(settings.schema_registry_url).id_of(schema, topic))
