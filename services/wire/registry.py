"""Confluent Schema Registry, when one is configured: ids to released schemas, and released schemas to ids.

Only schemas released here are accepted, whatever the registry holds; it is asked for each id once. While it
is away, or answers something that is no answer, it is asked again; only its own "no such schema", and a
schema that is not released here, make a record unreadable.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any
from urllib.parse import unquote, urlsplit

from schemas.catalog import Schema, by_fingerprint, crc_of
from schemas.evolution import logical_types
from services.wire.codec import Decoder, Encoder
from services.wire.errors import Misconfigured, Transient, UnknownSchema
from services.wire.settings import Settings

SCHEMA_NOT_FOUND = 40403
TIMEOUT_S = 10


class Registry:
    """A client of one registry. ``url`` may be several, with commas; ``user:password@`` in it is a secret.

    Raises:
        Misconfigured: no http or https address.
    """

    def __init__(self, url: str) -> None:
        # Imported here: it loads an HTTP client that a set-up without a registry does not need.
        from confluent_kafka.schema_registry import SchemaRegistryClient

        try:
            self._client = SchemaRegistryClient(_configuration(url))
        except Exception as error:  # its message may hold the password
            raise Misconfigured(
                f"TIDEMETER_SCHEMA_REGISTRY_URL: must be http or https addresses ({type(error).__name__})"
            ) from None
        self.schema_of = lru_cache(maxsize=1024)(self._schema_of)

    def _schema_of(self, schema_id: int) -> Schema:
        found = self._asked(schema_id)
        if found.schema_type != "AVRO":
            raise UnknownSchema("unknown_schema", f"schema {schema_id} is not an Avro schema")
        try:
            document = json.loads(found.schema_str)
        except (TypeError, ValueError):
            self._client.clear_caches()  # type: ignore[no-untyped-call]  # or it would repeat this answer for ever
            raise Transient("the schema registry answers something else than a schema") from None
        try:
            schema = by_fingerprint()[crc_of(document)]
            known = logical_types(document) == logical_types(schema.document)
        except Exception:
            raise UnknownSchema("unknown_schema", f"schema {schema_id} is not released here") from None
        if not known:  # the fingerprint does not tell milliseconds from microseconds
            raise UnknownSchema(
                "unknown_schema", f"schema {schema_id} has other logical types than {schema.label}"
            )
        return schema

    def _asked(self, schema_id: int) -> Any:
        from confluent_kafka.schema_registry import SchemaRegistryError

        try:
            return self._client.get_schema(schema_id)
        except SchemaRegistryError as error:
            # A 404 without this code is a proxy's, or of another path.
            if (error.http_status_code, error.error_code) == (404, SCHEMA_NOT_FOUND):
                raise UnknownSchema("unknown_schema", f"the registry has no schema {schema_id}") from None
            raise Transient(f"the schema registry answers {error.http_status_code}") from error
        except Exception as error:
            raise Transient("the schema registry does not answer") from error

    def id_of(self, schema: Schema, topic: str) -> int:
        """The id of ``schema`` under the subject ``<topic>-value``; registers it when it is new there.

        Raises:
            Transient: the registry does not answer.
            Misconfigured: it refuses the schema or the credentials.
        """
        from confluent_kafka.schema_registry import Schema as RegistrySchema
        from confluent_kafka.schema_registry import SchemaRegistryError

        text = schema.path.read_text(encoding="utf-8")
        try:
            return int(self._client.register_schema(f"{topic}-value", RegistrySchema(text, "AVRO")))
        except SchemaRegistryError as error:
            status = error.http_status_code
            if status in (401, 403):
                raise Misconfigured(f"the schema registry refuses the credentials ({status})") from None
            if status in (409, 422):
                raise Misconfigured(
                    f"the schema registry refuses {schema.label} under {topic}-value ({status}): look at "
                    "what that subject holds and at its compatibility level"
                ) from None
            raise Transient(f"the schema registry answers {status}") from error
        except Exception as error:
            raise Transient("the schema registry does not answer") from error


def _configuration(url: str) -> dict[str, Any]:
    """The client's configuration. Credentials leave the addresses, which HTTP libraries like to log."""
    parts = [urlsplit(one.strip()) for one in url.split(",")]
    if not all(one.scheme in ("http", "https") and one.hostname and one.port != 0 for one in parts):
        raise ValueError("no http or https address")
    found: dict[str, Any] = {
        "url": ",".join(one._replace(netloc=one.netloc.rpartition("@")[2]).geturl() for one in parts),
        "timeout": TIMEOUT_S,
        "max.retries": 1,  # a worker retries by itself, and says so in its health
        "retries.wait.ms": 200,
    }
    if parts[0].username is not None:
        found["basic.auth.user.info"] = f"{unquote(parts[0].username)}:{unquote(parts[0].password or '')}"
    return found


def _registry(settings: Settings) -> Registry | None:
    url = settings.schema_registry_url
    return Registry(url.get_secret_value()) if url is not None else None


def decoder_for(settings: Settings) -> Decoder:
    """A decoder of both framings, or of single-object encoding only without a registry."""
    registry = _registry(settings)
    return Decoder() if registry is None else Decoder(registry.schema_of)


def encoder_for(settings: Settings, schema: Schema, topic: str) -> Encoder:
    """A writer of ``schema`` in the configured framing.

    Raises:
        Transient, Misconfigured: as :meth:`Registry.id_of`.
    """
    registry = _registry(settings)
    return Encoder(schema, None if registry is None else registry.id_of(schema, topic))
