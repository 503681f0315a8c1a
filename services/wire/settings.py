"""All settings, from the environment, from secret files, or from a running ``tidemeter up``.

``TIDEMETER_X`` sets ``x``; ``TIDEMETER_X_FILE`` names a file that holds it, for secrets. What neither sets is
taken from the embedded runtime of the same data directory, when one is running; then from the default.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from services.wire.errors import Misconfigured

PREFIX = "TIDEMETER_"
RUNTIME_FILE = "runtime.json"


def data_directory() -> Path:
    """Where the embedded runtime keeps its data: ``TIDEMETER_DATA_DIR`` or ``~/.local/share/tidemeter``."""
    return Path(os.environ.get(f"{PREFIX}DATA_DIR", "~/.local/share/tidemeter")).expanduser()


def running_runtime() -> dict[str, Any]:
    """What a running ``tidemeter up`` of this data directory wrote about itself; empty when none runs.

    It holds a lock on the file while it lives, so a file that a killed one left behind says nothing.
    """
    try:
        with (data_directory() / RUNTIME_FILE).open(encoding="utf-8") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                document: dict[str, Any] = json.load(stream)
                return document
    except (OSError, ValueError):
        pass
    return {}


def secret_file(name: str) -> Path | None:
    """The file that setting ``name`` is read from; None if the variable itself holds it, or nothing does."""
    variable = PREFIX + name.upper()
    path = os.environ.get(f"{variable}_FILE")
    return None if path is None or variable in os.environ else Path(path)


class _SecretFiles(PydanticBaseSettingsSource):
    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        path = os.environ.get(f"{PREFIX}{field_name.upper()}_FILE")
        if path is None:
            return None, field_name, False
        try:
            return Path(path).read_text(encoding="utf-8").strip(), field_name, False
        except OSError as error:
            raise Misconfigured(
                f"{PREFIX}{field_name.upper()}_FILE: cannot read {path}: {error.strerror}"
            ) from error

    def __call__(self) -> dict[str, Any]:
        values = {
            name: self.get_field_value(field, name)[0]
            for name, field in self.settings_cls.model_fields.items()
        }
        return {name: value for name, value in values.items() if value is not None}


class _RunningRuntime(PydanticBaseSettingsSource):
    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        known = self.settings_cls.model_fields
        return {name: value for name, value in running_runtime().items() if name in known}


class Settings(BaseSettings):
    """Every setting with its unit. Instances print secrets masked."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True)

    kafka_bootstrap: str | None = Field(None, description="Kafka brokers, host:port[,host:port].")
    postgres_dsn: SecretStr | None = Field(None, description="PostgreSQL connection string.")
    schema_registry_url: SecretStr | None = Field(
        None, description="Confluent schema registry; switches the framing. May hold `user:password@`."
    )

    topic_partitions: int = Field(
        4, ge=1, le=1024, description="Partitions of each topic when it is created."
    )
    topic_replication: int | None = Field(
        None,
        ge=1,
        le=9,
        description="Replicas of each topic when it is created; unset for one on each broker, at most 3.",
    )
    min_insync_replicas: int | None = Field(
        None, ge=1, le=9, description="Replicas that must confirm a write; unset for all but one."
    )
    usage_retention_days: int = Field(
        90, ge=-1, description="How long usage topics keep records; -1 for ever."
    )

    archive_url: str | None = Field(
        None, description="Where usage records are archived, a path or a URL; unset for no archive."
    )
    archive_file_records: int = Field(
        100_000, ge=1, le=1_000_000, description="Records in one file of the archive, at most."
    )
    archive_file_seconds: float = Field(
        3600.0, gt=0, le=86_400, description="A record is in the archive about so long after its arrival."
    )

    http_host: str = Field("127.0.0.1", description="Address the API listens on.")
    http_port: int = Field(8080, ge=0, le=65535, description="Port the API listens on.")
    observe_host: str = Field("127.0.0.1", description="Address workers serve /health and /metrics on.")
    observe_port: int = Field(0, ge=0, le=65535, description="Port of that; 0 takes a free one and logs it.")

    worker_id: str | None = Field(None, description="Name of this worker in its group; needed to be static.")
    session_timeout_seconds: float = Field(10.0, ge=1, le=300, description="Kafka group session timeout.")
    chunk_records_max: int = Field(5000, ge=1, le=50_000, description="Records in one chunk, at most.")
    watchdog_seconds: float = Field(
        60.0, ge=1, description="Lag without progress for this long ends a worker."
    )
    dedupe_days: int = Field(35, ge=1, le=400, description="Idempotency keys are kept at least this long.")
    delta_interval_seconds: float = Field(
        1.0, gt=0, le=86_400, description="Pause between two rounds of closing."
    )

    replay_records_max: int = Field(
        20_000_000, ge=1, description="Records that one replay reads, unless it is forced."
    )
    replay_dry_run_seconds: float = Field(
        600.0, ge=1, le=86_400, description="Time limit of a dry run that is asked for by HTTP."
    )

    invoice_grace_seconds: float = Field(
        3600.0, ge=0, le=259_200, description="From a period's end to the moment its invoice is final."
    )
    close_margin_seconds: float = Field(
        300.0, ge=0, le=86_400, description="No push of a period begins this close to its final invoice."
    )

    bridge_host: str = Field("127.0.0.1", description="Address the webhook bridge listens on.")
    bridge_port: int = Field(8081, ge=0, le=65535, description="Port the webhook bridge listens on.")
    webhook_secrets: SecretStr | None = Field(
        None,
        description="Signing secrets of webhooks: `endpoint=whsec_…[,whsec_…]`, one endpoint to a line.",
    )
    webhook_handlers: str | None = Field(
        None, description="Own webhook handlers, as `module:name`, separated by commas."
    )
    webhook_concurrency: int = Field(4, ge=1, le=64, description="Webhook handlers that run at once.")
    webhook_attempts_max: int = Field(25, ge=1, le=25, description="Attempts of a webhook handler.")
    webhook_retry_seconds: float = Field(
        1.0, gt=0, le=3600, description="Pause after the first failed attempt; it doubles each time."
    )
    webhook_retry_max_seconds: float = Field(3600.0, gt=0, le=86_400, description="That pause, at most.")
    webhook_timeout_seconds: float = Field(60.0, gt=0, le=3600, description="Time limit of an own handler.")
    webhook_succeeded_days: int = Field(
        14, ge=-1, description="Succeeded webhooks are kept, at least 4; -1 for ever."
    )
    webhook_dead_days: int = Field(90, ge=-1, description="Dead webhooks are kept, at least 4; -1 for ever.")
    parked_auto_redrive: bool = Field(
        False, description="Re-drive parked records by themselves once a fix for them is there."
    )
    parked_settled_days: int = Field(
        90, ge=-1, description="Parked records that are settled are kept; -1 for ever."
    )
    dunning_days: int = Field(
        14, ge=0, le=365, description="A subscription past due for longer counts as exhausted."
    )
    card_expiry_days: int = Field(30, ge=1, le=365, description="Cards are told of so long before they end.")
    smtp_host: str | None = Field(None, description="Mail server for notifications; unset for none.")
    smtp_port: int = Field(587, ge=1, le=65535, description="Its port.")
    smtp_tls: Literal["starttls", "tls", "none"] = Field("starttls", description="How it is encrypted.")
    smtp_username: str | None = Field(None, description="User at the mail server.")
    smtp_password: SecretStr | None = Field(None, description="Password at the mail server.")
    mail_from: str | None = Field(None, description="Sender of notifications.")
    mail_to: str | None = Field(None, description="Who gets notifications, separated by commas.")
    mail_events: str | None = Field(
        None,
        description="Ops events that make a mail: `all`, or names, separated by commas; unset for the usual.",
    )

    stripe_api_key: SecretStr | None = Field(None, description="Restricted Stripe key for meter events.")
    stripe_api_base: str | None = Field(
        None, description="Base address of the Stripe API; unset for Stripe's own."
    )
    stripe_stream_base: str | None = Field(
        None, description="Base address of Stripe's event stream; unset for that of the API, or Stripe's own."
    )
    sink: Literal["stripe", "webhook"] = Field("stripe", description="Where deltas go.")
    sink_webhook_url: str | None = Field(
        None, description="Endpoint that takes deltas, if the sink is a webhook."
    )
    sink_webhook_secret: SecretStr | None = Field(
        None,
        description="Secret that deltas to a webhook are signed with: `whsec_` and base64 of 24 to 64 bytes.",
    )

    stripe_mode: Literal["meter_events", "stream"] = Field(
        "meter_events",
        description="One call to Stripe for each meter event (v1), or one for up to 100 (v2 stream).",
    )
    stripe_rate_per_second: float = Field(
        200.0, gt=0, le=10_000, description="Meter events per second, at most."
    )
    stripe_concurrency: int = Field(16, ge=1, le=256, description="Calls to Stripe in flight, at most.")
    stripe_timeout_seconds: float = Field(20.0, gt=0, le=80, description="Time limit of one call to Stripe.")
    stripe_allow_live: bool = Field(False, description="Must be true before an sk_live_ key is accepted.")

    reconcile_interval_seconds: float = Field(
        900.0, ge=1, le=86_400, description="Pause between two reconciliations."
    )
    reconcile_patience_seconds: float = Field(
        3600.0, ge=0, le=86_400, description="Stripe may take so long to show usage, and a push to leave."
    )
    reconcile_epsilon: float = Field(
        0.005, ge=0, lt=1, description="A difference up to this part of Stripe's total is a small one."
    )
    reconcile_rate_per_second: float = Field(
        20.0, gt=0, le=100, description="Questions of the reconciler to Stripe per second, at most."
    )

    log_format: Literal["auto", "json", "console"] = Field("auto", description="Form of the log lines.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level logged.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then environment, then secret files, then the running embedded runtime."""
        return init_settings, env_settings, _SecretFiles(settings_cls), _RunningRuntime(settings_cls)

    def kafka(self) -> str:
        """Bootstrap servers.

        Raises:
            Misconfigured: none known.
        """
        if self.kafka_bootstrap is None:
            raise Misconfigured(
                "no Kafka address: set TIDEMETER_KAFKA_BOOTSTRAP, or run `tidemeter up` first"
            )
        return self.kafka_bootstrap

    def postgres(self) -> str:
        """Connection string; a secret.

        Raises:
            Misconfigured: none known.
        """
        if self.postgres_dsn is None:
            raise Misconfigured(
                "no PostgreSQL address: set TIDEMETER_POSTGRES_DSN, or run `tidemeter up` first"
            )
        return self.postgres_dsn.get_secret_value()

    def archive(self) -> str:
        """Where the archive is.

        Raises:
            Misconfigured: there is none.
        """
        if self.archive_url is None:
            raise Misconfigured("no archive: set TIDEMETER_ARCHIVE_URL to a path or a URL")
        return self.archive_url

    @property
    def streams(self) -> bool:
        """Whether usage goes to Stripe's event stream."""
        return self.sink == "stripe" and self.stripe_mode == "stream"

    def webhook_sink(self) -> tuple[str, str]:
        """Address and secret of the webhook that takes deltas; the second is a secret.

        Raises:
            Misconfigured: one of them is not set.
        """
        if self.sink_webhook_url is None or self.sink_webhook_secret is None:
            raise Misconfigured(
                "the sink is a webhook: set TIDEMETER_SINK_WEBHOOK_URL, and TIDEMETER_SINK_WEBHOOK_SECRET "
                "or TIDEMETER_SINK_WEBHOOK_SECRET_FILE"
            )
        return self.sink_webhook_url, self.sink_webhook_secret.get_secret_value()

    def stripe_key(self) -> str:
        """Stripe API key; a secret.

        Raises:
            Misconfigured: none set, or a live key without ``TIDEMETER_STRIPE_ALLOW_LIVE=true``.
        """
        if self.stripe_api_key is None:
            raise Misconfigured(
                "no Stripe key: set TIDEMETER_STRIPE_API_KEY or TIDEMETER_STRIPE_API_KEY_FILE"
            )
        key = self.stripe_api_key.get_secret_value()
        if "_live_" in key and not self.stripe_allow_live:
            raise Misconfigured(
                "the Stripe key is a live one: set TIDEMETER_STRIPE_ALLOW_LIVE=true to bill for real"
            )
        return key


def load_settings(**overrides: Any) -> Settings:
    """Settings of this process; ``overrides`` that are None are ignored.

    Raises:
        Misconfigured: a value is out of range; the message names the variable.
    """
    try:
        return Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = PREFIX + "_".join(str(part) for part in first["loc"]).upper()
        raise Misconfigured(f"{name}: {first['msg']}") from None
