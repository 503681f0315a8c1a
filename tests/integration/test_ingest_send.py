"""`tidemeter send` and `tidemeter keys` against a running API, Kafka and PostgreSQL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from services.cli.keys import keys_app
from services.cli.send import send
from tests.integration.ingest_serving import Serving, new_tenant, records_of, serving
from tests.proxy import KafkaProxy

app = typer.Typer()
app.command()(send)


@pytest.fixture
def api(kafka_bootstrap: str, postgres_dsn: str) -> Iterator[Serving]:
    with serving(kafka_bootstrap, postgres_dsn) as api:
        yield api


@pytest.fixture
def tenant(api: Serving) -> str:
    return new_tenant(api.dsn)


def run(*arguments: str | Path, key: str = "", stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], input=stdin, env={"TIDEMETER_API_KEY": key or None}
    )


def line(key: str, **changes: object) -> str:
    return json.dumps(
        {"metric": "requests", "customerRef": "cust_42", "quantity": 1, "idempotencyKey": key, **changes}
    )


def test_a_file_is_sent_whole_and_a_second_time_changes_nothing(
    api: Serving, tenant: str, tmp_path: Path, kafka_bootstrap: str
) -> None:
    file = tmp_path / "usage.ndjson"
    event = line("k0", quantity=0.10, ts="2026-03-01T12:00:00+01:00", meta={"n": 1.50, "b": True})
    file.write_text("\n\n".join([event, *(line(f"k{number}") for number in range(1, 1200))]))
    key = api.key(tenant).text
    for _ in range(2):
        result = run(file, "--api-url", api.url, "--json", key=key)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout) == {
            "lines": 1200,
            "accepted": 1200,
            "refused": 0,
            "unavailable": 0,
            "interrupted": False,
        }
    stored = records_of(kafka_bootstrap, tenant, at_least=2400)
    assert {record["idempotency_key"] for record in stored} == {f"k{number}" for number in range(1200)}
    first, second = (record for record in stored if record["idempotency_key"] == "k0")
    assert first == second
    assert first["properties"] == {"n": "1.5", "b": "true"}
    assert first["occurred_at"] == 1_772_362_800_000_000


def test_refused_lines_are_listed_with_number_path_and_code(
    api: Serving, tenant: str, tmp_path: Path
) -> None:
    lines = [
        line("k1"),
        line("k2", quantity="NaN"),
        "{not json",
        line("k4", tenantId="someone-else"),
        '{"metric": "requests", "customerRef": "\\ud800", "quantity": 1, "idempotencyKey": "k5"}',
        "[" + line("k6") + "]",
        line("k7", customerRef="x" * 2_000_000),
        line("k8"),
    ]
    file, errors = tmp_path / "usage.jsonl", tmp_path / "refused.ndjson"
    file.write_text("\n".join(lines))
    result = run(file, "--api-url", api.url, "--errors", errors, key=api.key(tenant).text)
    assert result.exit_code == 1
    assert "8 lines: 2 accepted, 6 refused" in result.stdout
    found = {
        entry["line"]: (entry["code"], entry["path"])
        for entry in map(json.loads, errors.read_text().splitlines())
    }
    assert found == {
        2: ("quantity_not_finite", "quantity"),
        3: ("body_not_json", ""),
        4: ("tenant_forbidden", "tenantId"),
        5: ("lone_surrogate", "customerRef"),
        6: ("line_invalid", ""),
        7: ("line_too_long", ""),
    }


def test_csv_goes_straight_to_kafka_with_its_properties(
    tenant: str, tmp_path: Path, kafka_bootstrap: str
) -> None:
    file = tmp_path / "usage.csv"
    file.write_text(
        "\ufeffmetric,customerRef,quantity,ts,idempotencyKey,meta.region\n"
        'requests,"cust, 42",12.5,2026-03-01T12:00:00Z,k1,eu\n'
        "requests,cust_43,1,,k2,\n"
        "requests,cust_44,,,k3,\n"
        "requests,cust_45,1,,k4\n"
    )
    result = run(file, "--kafka", kafka_bootstrap, "--tenant", tenant)
    assert result.exit_code == 1
    assert "4 lines: 2 accepted, 2 refused" in result.stdout
    stored = {record["idempotency_key"]: record for record in records_of(kafka_bootstrap, tenant, at_least=2)}
    assert stored["k1"]["customer_ref"] == "cust, 42"
    assert stored["k1"]["properties"] == {"region": "eu"}
    assert (stored["k2"]["properties"], stored["k2"]["occurred_at"]) == ({}, None)
    assert stored["k1"]["source"] == "cli"


def test_standard_input_is_read_as_ndjson_or_as_told(api: Serving, tenant: str) -> None:
    key = api.key(tenant).text
    assert run("-", "--api-url", api.url, key=key, stdin=line("k1").encode()).exit_code == 0
    table = b"metric,customerRef,quantity,idempotencyKey\nrequests,c,1,k2\n"
    assert run("-", "--format", "csv", "--api-url", api.url, key=key, stdin=table).exit_code == 0
    assert run("-", "--api-url", api.url, key=key, stdin=b"").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.ndjson"], "cannot read missing.ndjson"),
        (["-", "--api-url", "nonsense"], "is not an http address"),
        (["-", "--kafka", "k:9092", "--api-url", "http://a"], "not both"),
        (["-", "--format", "csv"], "CSV column 'customer'"),
    ],
)
def test_misuse_says_what_to_do_and_exits_2(arguments: list[str], message: str) -> None:
    csv = "--format" in arguments
    result = run(*arguments, key="tmk_x", stdin=b"customer\nx\n" if csv else line("k1").encode())
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_a_wrong_key_or_address_exits_2_at_once(api: Serving, tenant: str) -> None:
    assert run("-", "--api-url", api.url, stdin=b"").exit_code == 2
    wrong = run("-", "--api-url", api.url, key="tmk_wrong", stdin=line("k1").encode())
    assert (wrong.exit_code, "TIDEMETER_API_KEY" in wrong.stderr) == (2, True)
    elsewhere = run("-", "--api-url", f"{api.url}/v2", key=api.key(tenant).text, stdin=line("k1").encode())
    assert (elsewhere.exit_code, "address of the Tidemeter API" in elsewhere.stderr) == (2, True)


def test_an_unavailable_api_is_retried_and_then_given_up_with_3(tenant: str) -> None:
    started_s = time.monotonic()
    arguments = ("-", "--api-url", "http://127.0.0.1:9", "--give-up-after", "1.5")
    result = run(*arguments, key="tmk_x", stdin=line("k1").encode())
    assert (result.exit_code, "run the same command again" in result.stderr) == (3, True)
    assert 0.5 < time.monotonic() - started_s < 20


def test_a_kafka_outage_in_the_middle_is_waited_out(
    tenant: str, postgres_dsn: str, kafka_bootstrap: str
) -> None:
    with (
        KafkaProxy(kafka_bootstrap) as proxy,
        serving(proxy.bootstrap, postgres_dsn, ack_timeout_s=2.0) as api,
    ):
        proxy.cut()
        with _started(api, tenant, "--give-up-after", "60") as process:
            process.stdin.write((line("k1") + "\n").encode())
            process.stdin.close()
            time.sleep(3)
            assert process.poll() is None
            proxy.restore()
            assert process.wait(60) == 0
    assert {record["idempotency_key"] for record in records_of(kafka_bootstrap, tenant, at_least=1)} == {"k1"}


def test_ctrl_c_stops_and_says_how_many_were_acknowledged(api: Serving, tenant: str) -> None:
    with _started(api, tenant) as process:
        for number in range(700):
            process.stdin.write((line(f"k{number}") + "\n").encode())
        process.stdin.flush()
        time.sleep(4)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        message = process.stderr.read().decode()
    assert "interrupted: 500 events are known to be acknowledged" in message
    assert "Traceback" not in message


def _started(api: Serving, tenant: str, *arguments: str) -> subprocess.Popen[bytes]:
    code = "import typer; from services.cli.send import send; typer.run(send)"
    return subprocess.Popen(
        [sys.executable, "-c", code, "-", "--api-url", api.url, *arguments],
        env={**os.environ, "TIDEMETER_API_KEY": api.key(tenant).text},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


# Keys -----------------------------------------------------------------------------------------------


def keys(dsn: str, *arguments: str) -> Result:
    return CliRunner().invoke(keys_app, list(arguments), env={"TIDEMETER_POSTGRES_DSN": dsn})


def test_a_created_key_works_until_it_is_revoked_and_is_shown_once(api: Serving, tenant: str) -> None:
    created = keys(api.dsn, "create", "--tenant", tenant, "--scope", "ingest", "--label", "gateway", "--json")
    assert created.exit_code == 0, created.output
    document = json.loads(created.stdout)
    assert run("-", "--api-url", api.url, key=document["key"], stdin=line("k1").encode()).exit_code == 0
    listed = keys(api.dsn, "list", "--tenant", tenant, "--json")
    (row,) = json.loads(listed.stdout)
    assert (row["keyId"], row["label"], row["scopes"]) == (document["keyId"], "gateway", ["ingest"])
    assert document["key"] not in listed.stdout + keys(api.dsn, "list").stdout
    assert keys(api.dsn, "revoke", document["keyId"]).exit_code == 0
    assert keys(api.dsn, "revoke", document["key"]).exit_code == 0
    time.sleep(5.1)
    assert run("-", "--api-url", api.url, key=document["key"], stdin=line("k1").encode()).exit_code == 2


def test_a_key_for_an_unknown_tenant_creates_neither(api: Serving) -> None:
    result = keys(api.dsn, "create", "--tenant", "nobody", "--scope", "ingest")
    assert (result.exit_code, "tidemeter apply" in result.stderr) == (2, True)


def test_only_an_operators_key_may_be_without_a_tenant(api: Serving) -> None:
    assert keys(api.dsn, "create", "--scope", "ingest").exit_code == 2
    assert keys(api.dsn, "create", "--scope", "nonsense", "--tenant", "x").exit_code == 2
    operator = keys(api.dsn, "create", "--scope", "admin", "--expires-days", "1")
    assert operator.stdout.startswith("tmk_")
    assert keys(api.dsn, "revoke", operator.stdout.strip()).exit_code == 0
    assert keys(api.dsn, "revoke", "unknown").exit_code == 2


def test_an_unreachable_database_is_named_and_exits_3() -> None:
    result = keys("postgresql://u:planted@127.0.0.1:9/x", "list")
    assert (result.exit_code, "PostgreSQL does not answer" in result.stderr) == (3, True)
    assert "planted" not in result.output


@pytest.mark.parametrize("command", ["create", "list", "revoke"])
def test_every_help_has_an_example(command: str) -> None:
    assert f"tidemeter keys {command}" in CliRunner().invoke(keys_app, [command, "--help"]).output
    assert "tidemeter send usage.csv" in CliRunner().invoke(app, ["--help"]).output
