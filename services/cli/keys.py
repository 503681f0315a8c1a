"""``tidemeter keys``: create, list and revoke API keys."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import psycopg
import typer
from psycopg.rows import dict_row
from rich.console import Console
from rich.table import Column, Table

from services.cli.common import MISUSED, JsonFlag, database, fail, sentences
from services.web.keys import SCOPES, generate_key

keys_app = typer.Typer(name="keys", help="Create, list and revoke API keys.", no_args_is_help=True)


def _checked_scopes(scopes: list[str]) -> list[str]:
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown:
        raise typer.BadParameter(f"{unknown[0]} is none of {', '.join(SCOPES)}")
    return sorted(set(scopes))


@keys_app.command()
def create(
    scope: Annotated[
        list[str],
        typer.Option(callback=_checked_scopes, help="ingest, read, adjust, replay or admin; repeatable."),
    ],
    tenant: Annotated[
        str | None,
        typer.Option(help="The only tenant the key is good for; with --scope admin, none means all."),
    ] = None,
    label: Annotated[str, typer.Option(help="What the key is for; shown in lists.")] = "",
    expires_days: Annotated[int | None, typer.Option(min=1, max=3650, help="Days until it expires.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Create a key and print it, once: only its hash is stored.

    Example: tidemeter keys create --tenant acme --scope ingest --label gateway
    """
    if tenant is None and "admin" not in scope:
        raise fail("--tenant is needed, except for a key with --scope admin", MISUSED)
    key = generate_key()
    expires_at = None if expires_days is None else datetime.now(UTC) + timedelta(days=expires_days)
    with sentences(), database() as connection:
        try:
            connection.execute(
                "INSERT INTO api_keys (key_id, tenant_id, secret_sha256, scopes, label, expires_at)"
                " VALUES (%s, %s, %s, %s, %s, %s)",
                (key.key_id, tenant, key.secret_sha256, scope, label, expires_at),
            )
        except psycopg.errors.ForeignKeyViolation:
            raise fail(
                f"there is no tenant {tenant}: declare it in a file and run `tidemeter apply -f FILE`",
                MISUSED,
            ) from None
    if as_json:
        document = {
            "keyId": key.key_id,
            "key": key.text,
            "tenantId": tenant,
            "scopes": scope,
            "expiresAt": expires_at and expires_at.isoformat(),
        }
        typer.echo(json.dumps(document))
        return
    typer.echo(key.text)
    typer.echo("Keep it now: it is not shown again.", err=True)


@keys_app.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Only keys of this tenant.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List keys, newest first, without their secrets.

    Example: tidemeter keys list --tenant acme
    """
    with sentences(), database() as connection:
        rows = (
            connection.cursor(row_factory=dict_row)
            .execute(
                "SELECT key_id, tenant_id, scopes, label, created_at, expires_at, revoked_at, last_used_at"
                " FROM api_keys WHERE %(tenant)s::text IS NULL OR tenant_id = %(tenant)s"
                " ORDER BY created_at DESC",
                {"tenant": tenant},
            )
            .fetchall()
        )
    if as_json:
        typer.echo(json.dumps([{_camel(name): _shown(value) for name, value in row.items()} for row in rows]))
        return
    table = Table(
        Column("key id", no_wrap=True), "tenant", "scopes", "label", "created", "last used", "state"
    )
    for row in rows:
        table.add_row(
            row["key_id"],
            row["tenant_id"] or "every",
            " ".join(row["scopes"]),
            row["label"],
            _day(row["created_at"]),
            _day(row["last_used_at"]),
            _state(row),
        )
    Console().print(table)


@keys_app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="KEYID", help="The middle part of the key.")],
) -> None:
    """Revoke a key; the API refuses it within five seconds. Revoking it again is harmless.

    Example: tidemeter keys revoke h3k5qz7m2w4n6p2a
    """
    if key_id.startswith("tmk_"):
        key_id = key_id.split("_")[1]
    with sentences(), database() as connection:
        revoked = connection.execute(
            "UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE key_id = %s RETURNING key_id",
            (key_id,),
        ).fetchone()
    if revoked is None:
        raise fail("there is no key with this id; `tidemeter keys list` shows them", MISUSED)
    typer.echo(f"revoked {key_id}")


def _camel(name: str) -> str:
    head, *tail = name.split("_")
    return head + "".join(part.capitalize() for part in tail)


def _shown(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _day(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M}" if moment is not None else "never"


def _state(row: dict[str, Any]) -> str:
    if row["revoked_at"] is not None:
        return "revoked"
    if row["expires_at"] is not None and row["expires_at"] <= datetime.now(UTC):
        return "expired"
    return "active"
