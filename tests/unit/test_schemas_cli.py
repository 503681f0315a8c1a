"""``tidemeter schemas``: what is released, what a change would be, and what is never allowed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from schemas.catalog import CURRENT_VERSIONS, ROOT, released, writers
from services.cli.common import ATTENTION, MISUSED
from services.cli.main import app
from services.cli.schemas import PLACES
from services.wire.topics import plan_topics

Document = dict[str, Any]
V3: Document = json.loads((ROOT / "usage_event/v3.avsc").read_text())
ADDED = {"name": "region", "type": "string", "default": "", "doc": "Where it was used."}


def schemas(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["schemas", *arguments])


def field(document: Document, name: str) -> Document:
    return next(one for one in document["fields"] if one["name"] == name)


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., tuple[int, Any]]:
    """Check a document; the exit status and what ``--json`` says."""

    def run(document: Any, *more: str, subject: str = "usage_event") -> tuple[int, Any]:
        path = tmp_path / "proposed.avsc"
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        result = schemas("check", str(path), "--subject", subject, "--json", *more)
        return result.exit_code, json.loads(result.stdout)

    return run


# list ---------------------------------------------------------------------------------------------------


def test_the_list_has_every_released_schema_and_says_that_the_chain_holds() -> None:
    result = schemas("list", "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["holds"] and document["problem"] is None and document["corpus_records"] > 0
    assert len(document["schemas"]) == len(writers())
    first, last = document["schemas"][0], document["schemas"][2]
    assert first == {
        "subject": "usage_event",
        "version": "1",
        "topic": "usage.v1",
        "fingerprint": released()["usage_event", 1].fingerprint.hex(),
        "current": False,
        "written_by": "older releases",
        "upcasts": "v1 → v2 → v3",
    }
    assert (last["current"], last["written_by"], last["upcasts"]) == (True, "ingest, producer, send", "–")
    assert "come through" in schemas("list").stdout


def test_every_subject_has_topics_that_exist_and_a_writer() -> None:
    plans = plan_topics(partitions=1, replication=1, min_insync_replicas=1, usage_retention_days=1)
    named = [place for place, _ in PLACES.values()]
    listed = {name for one in named for name in ([one] if isinstance(one, str) else one.values())}
    assert PLACES.keys() == CURRENT_VERSIONS.keys()
    assert listed <= {plan.name for plan in plans}


# check: what may stay ------------------------------------------------------------------------------------


def edited(edit: Callable[[Document], Any]) -> Document:
    document = copy.deepcopy(V3)
    edit(document)
    return document


@pytest.mark.parametrize(
    ("code", "edit"),
    [
        ("field_added", lambda d: d["fields"].append(ADDED)),
        (
            "field_added",
            lambda d: d["fields"].insert(0, {**ADDED, "type": ["null", "long"], "default": None}),
        ),
        ("field_removed", lambda d: d["fields"].remove(field(d, "occurred_at"))),
        ("order_changed", lambda d: d["fields"].reverse()),
    ],
)
def test_what_avro_bridges_both_ways_may_stay(check: Any, code: str, edit: Any) -> None:
    status, found = check(edited(edit))
    assert (status, found["verdict"]) == (0, "compatible")
    assert found["new_reads_old"] and found["old_reads_new"]
    assert code in [one["code"] for one in found["differences"]]


@pytest.mark.parametrize(
    ("code", "path", "new_reads_old", "old_reads_new", "edit"),
    [
        (
            *("field_added_without_default", "region", False, True),
            lambda d: d["fields"].append({key: ADDED[key] for key in ("name", "type", "doc")}),
        ),
        (
            *("field_removed_without_default", "source", True, False),
            lambda d: d["fields"].remove(field(d, "source")),
        ),
        ("null_added", "meter", True, False, lambda d: field(d, "meter").update(type=["null", "string"])),
        (
            *("null_removed", "occurred_at", False, True),
            lambda d: field(d, "occurred_at").update(type=field(d, "occurred_at")["type"][1], default=0),
        ),
        ("type_changed", "meter", True, True, lambda d: field(d, "meter").update(type="bytes")),
        ("type_changed", "meter", False, False, lambda d: field(d, "meter").update(type="long")),
        ("size_changed", "quantity", False, False, lambda d: field(d, "quantity")["type"].update(size=20)),
        ("record_renamed", "(record)", False, False, lambda d: d.update(name="usage")),
    ],
)
def test_what_avro_does_not_bridge_needs_a_new_version(
    check: Any, code: str, path: str, new_reads_old: bool, old_reads_new: bool, edit: Any
) -> None:
    status, found = check(edited(edit))
    assert (status, found["verdict"]) == (ATTENTION, "new_version")
    assert (found["new_reads_old"], found["old_reads_new"]) == (new_reads_old, old_reads_new)
    assert (code, path) in [(one["code"], one["path"]) for one in found["differences"]]


def test_a_new_symbol_is_one_that_older_readers_do_not_know(check: Any) -> None:
    document = json.loads((ROOT / "usage_delta/v2.avsc").read_text())
    field(document, "formula")["type"]["symbols"].append("max")
    status, found = check(document, subject="usage_delta")
    assert status == ATTENTION
    [change] = found["differences"]
    assert (change["code"], change["new_reads_old"], change["old_reads_new"]) == (
        "symbols_changed",
        True,
        False,
    )


def test_a_logical_type_beside_another_change_breaks_both_directions(check: Any) -> None:
    def edit(document: Document) -> None:
        document["fields"].append(ADDED)
        field(document, "quantity")["type"]["scale"] = 6

    status, found = check(edited(edit))
    assert (status, found["new_reads_old"], found["old_reads_new"]) == (ATTENTION, False, False)


def test_another_version_can_be_compared_with(check: Any) -> None:
    document = json.loads((ROOT / "usage_delta/v1.avsc").read_text())
    document["fields"].append(ADDED)
    assert check(document, "--against", "1", subject="usage_delta")[0] == 0


def test_what_is_compared_is_said_in_words_too(tmp_path: Path) -> None:
    path = tmp_path / "proposed.avsc"
    path.write_text(json.dumps(edited(lambda d: d["fields"].append(ADDED))))
    assert (
        "may stay on usage.v3 as a revision" in schemas("check", str(path), "--subject", "usage_event").stdout
    )
    path.write_text(json.dumps(edited(lambda d: d.update(name="usage"))))
    said = schemas("check", str(path), "--subject", "usage_event").stdout
    assert "needs a new version, a new topic and an upcaster" in said


# check: what is refused ----------------------------------------------------------------------------------


def of_type(kind: Any, **more: Any) -> Document:
    field = {"name": "extra", "type": kind, "doc": "Extra.", **more}
    return edited(lambda d: d["fields"].append(field))


@pytest.mark.parametrize(
    ("code", "document"),
    [
        ("not_json", "{"),
        ("not_a_record", "[]"),
        ("not_a_record", '{"type": "enum", "name": "e", "symbols": ["a"]}'),
        ("not_avro", '{"type": "record", "doc": "x", "fields": []}'),
        ("not_avro", edited(lambda d: d["fields"].append(d["fields"][0]))),
        ("not_avro", edited(lambda d: d["fields"].append({"name": "extra"}))),
        ("not_avro", of_type({"type": "fixed", "name": "quantity_decimal", "size": 3})),
        ("not_avro", of_type({"type": "enum", "name": "e", "symbols": "abc"})),
        ("not_avro", of_type("string", name="two words")),
        ("recursive_type", of_type("usage_event")),
        ("recursive_type", of_type(["null", "tidemeter.usage_event"])),
        ("recursive_type", of_type({"type": "array", "items": "tidemeter.usage_event"})),
        ("zero_width_type", edited(lambda d: d.update(fields=[]))),
        ("zero_width_type", of_type("null")),
        ("zero_width_type", of_type({"type": "null"})),
        ("zero_width_type", of_type({"type": "record", "name": "nothing", "fields": []})),
        ("zero_width_type", of_type({"type": "array", "items": "null"})),
        (
            "zero_width_type",
            of_type({"type": "array", "items": {"type": "record", "name": "n", "fields": []}}),
        ),
        ("zero_width_type", of_type({"type": "fixed", "name": "nothing", "size": 0})),
        ("zero_width_type", of_type({"type": "enum", "name": "nothing", "symbols": []})),
        ("union", of_type(["string", "null"])),
        ("union", of_type(["null"])),
        ("union", of_type(["null", "null"])),
        ("union", of_type(["null", "string", "long"])),
        ("union", of_type(["string", "long"])),
        ("bytes_decimal", of_type({"type": "bytes", "logicalType": "decimal", "precision": 38, "scale": 9})),
        ("type_not_read", of_type("boolean")),
        ("type_not_read", of_type("float")),
        ("type_not_read", of_type("quantity_decimal")),
        ("type_not_read", of_type({"type": "string", "avro.java.string": "String"})),
        ("type_not_read", of_type({"type": {"type": "string"}})),
        ("type_not_read", of_type({"type": "map", "values": "long"})),
        ("type_not_read", of_type({"type": "array", "items": {"type": "array", "items": "string"}})),
        ("type_not_read", of_type({"type": "record", "name": "in", "fields": [ADDED]})),
        ("missing_doc", edited(lambda d: field(d, "meter").pop("doc"))),
        ("missing_doc", edited(lambda d: field(d, "meter").update(doc=" "))),
        ("missing_doc", edited(lambda d: d.pop("doc"))),
        ("aliases", edited(lambda d: field(d, "meter").update(aliases=["metric"]))),
        ("invalid_default", of_type("string", default=None)),
        ("invalid_default", of_type("int", default=2**31)),
        ("invalid_default", of_type("long", default=True)),
        ("invalid_default", of_type(["null", "string"], default="")),
        ("invalid_default", of_type("bytes", default="")),
        ("invalid_default", of_type({"type": "map", "values": "string"}, default={"a": 1})),
        ("invalid_default", of_type({"type": "enum", "name": "e", "symbols": ["a"]}, default="b")),
        ("same_fingerprint", edited(lambda d: field(d, "meter").update(doc="Another text."))),
        ("same_fingerprint", edited(lambda d: field(d, "meter").update(default="requests"))),
        ("same_fingerprint", edited(lambda d: field(d, "quantity")["type"].update(scale=6))),
    ],
)
def test_what_is_never_allowed_is_refused_by_name(check: Any, code: str, document: Any) -> None:
    status, found = check(document)
    assert (status, found["verdict"]) == (MISUSED, "refused")
    assert code in [one["code"] for one in found["refusals"]]


def test_each_kind_of_refusal_has_a_sentence_of_its_own(check: Any) -> None:
    told = {
        refusal["code"]: refusal["why"]
        for kind in ("null", "boolean", "usage_event", ["null"], {"type": "bytes", "logicalType": "decimal"})
        for refusal in check(of_type(kind))[1]["refusals"]
    }
    assert len(told) == len(set(told.values())) == 5


def test_an_edited_released_file_is_refused_and_so_is_a_released_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released_file = ROOT / "usage_event/v3.avsc"
    result = schemas("check", str(released_file), "--subject", "usage_event", "--json")
    assert result.exit_code == MISUSED
    assert [one["code"] for one in json.loads(result.stdout)["refusals"]] == ["already_released"]

    lock = tmp_path / "LOCK"
    lock.write_text(f"{'0' * 64}  usage_event/v3.avsc\n")
    monkeypatch.setattr("schemas.proposal.LOCK_FILE", lock)
    result = schemas("check", str(released_file), "--subject", "usage_event", "--json")
    assert [one["code"] for one in json.loads(result.stdout)["refusals"]] == ["released_file_edited"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "/nowhere.avsc", "--subject", "usage_event"),
        ("check", str(ROOT / "usage_event/v3.avsc"), "--subject", "usage"),
        ("check", str(ROOT / "usage_event/v3.avsc"), "--subject", "usage_event", "--against", "9"),
        ("diff", "usage", "1", "2"),
        ("diff", "usage_event", "1", "9"),
        ("diff", "usage_event", "3.0", "3.7"),
        ("diff", "usage_event", "3", "/nowhere.avsc"),
        ("diff", "usage_event", "3", str(ROOT / "LOCK")),
        ("new-version", "usage"),
    ],
)
def test_misuse_is_one_sentence_and_status_2(arguments: tuple[str, ...]) -> None:
    result = schemas(*arguments)
    assert result.exit_code == MISUSED
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


# diff ---------------------------------------------------------------------------------------------------


def test_two_versions_are_compared_field_by_field() -> None:
    found = json.loads(schemas("diff", "usage_event", "2", "3", "--json").stdout)
    by_path = {(one["path"], one["code"]): one for one in found}
    assert by_path["tenant_id", "field_added_without_default"]["after"] == "string"
    assert by_path["tenant", "field_removed_without_default"]["before"] == "string"
    scale = by_path["quantity", "logical_type_changed"]
    assert (scale["before"][-8:], scale["after"][-8:]) == ("scale 6)", "scale 9)")
    table = schemas("diff", "usage_event", "2", "3").stdout
    assert all(one["path"] in table and one["code"] in table for one in found)


def test_a_version_is_compared_with_a_file(tmp_path: Path) -> None:
    path = tmp_path / "proposed.avsc"
    path.write_text(json.dumps(edited(lambda d: d["fields"].append(ADDED))))
    [change] = json.loads(schemas("diff", "usage_event", "3.0", str(path), "--json").stdout)
    assert (change["code"], change["path"]) == ("field_added", "region")
    assert schemas("diff", "usage_event", "3", "3").stdout == "no difference\n"
