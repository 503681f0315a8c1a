"""The guide is true: on a copy of the repository its steps are carried out, as an engineer would."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.wire.codec import Decoder
from services.wire.errors import UnknownSchema
from services.wire.usage import event_id_hash
from tests.records import chunk_of, configuration, encoded, v3

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/evolution.md").read_text(encoding="utf-8")
STARTS = (
    "from schemas.catalog import *; from upcasters.chain import *; check_catalog(); check_chain(upcasters())"
)
#: What a worker does with records of every release; prints the events, and a value of the newest schema.
COUNTS = """
import json, sys
from schemas.catalog import current, released, by_fingerprint
from services.counters.prepare import Preparer
from services.wire.codec import Decoder, Encoder, read_body
from services.wire.usage import UsageEvent, encode_usage, to_record, usage_encoder
from tests.records import ARRIVAL_US, Raw, chunk_of, configuration
from upcasters.chain import upcasters

event = UsageEvent("acme", "cust-1", "requests", 5, "evt-1", properties={"region": "eu-west"})
value = encode_usage(usage_encoder(), to_record(event, source="test", now_us=ARRIVAL_US))
old = [bytes.fromhex(text) for text in json.load(sys.stdin)]
chain = upcasters()
found = {"value": value.hex(), "steps": [step.name for step in chain.path("usage_event", 1)], "read": []}
for version, one in [*enumerate(old, 1), (int(sys.argv[1]), value)]:
    prepared = Preparer(Decoder(), chain).prepare(chunk_of([one], version), configuration())
    schema, record = Decoder().decode(one)
    latest = chain.to_current(schema.subject, schema.version, record)
    found["read"].append([len(prepared.events), len(prepared.parked), latest["region"]])
    found["id"] = prepared.events[0][1].hex()
print(json.dumps(found))
"""
V1 = {
    "event_id": "evt-1",
    "customer": "acme/cust-1",
    "metric": "requests",
    "value": 5.0,
    "timestamp": 1_772_366_400,
    "tags": ["region=eu-west"],
}
V2 = {
    "event_id": "evt-1",
    "tenant": "acme",
    "customer": "cust-1",
    "metric": "requests",
    "quantity": (5_000_000).to_bytes(16, "big", signed=True),
    "used_at": 1_772_366_400_000_000,
    "attributes": {"region": "eu-west"},
}
OLD_VALUES = [encoded(V1, 1), encoded(V2, 2), encoded(v3(properties={"region": "eu-west"}), 3)]


@dataclass
class Copy:
    """A checkout of its own."""

    root: Path

    def run(self, *arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(self.root), "COLUMNS": "200"}
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=self.root, env=environment, input=given, text=True, capture_output=True, check=False
        )

    def tidemeter(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "services.cli.main", *arguments)

    def starts(self) -> str:
        """What a process says that checks itself as workers do at start; empty when it starts."""
        return self.run("-c", STARTS).stderr.strip().rpartition("\n")[2]

    def edit(self, name: str, old: str, new: str) -> None:
        text = (self.root / name).read_text(encoding="utf-8")
        assert old in text, (name, old)
        (self.root / name).write_text(text.replace(old, new, 1), encoding="utf-8")

    def add_field(self, name: str, field: dict[str, str]) -> None:
        path = self.root / name
        document = json.loads(path.read_text())
        path.write_text(json.dumps({**document, "fields": [*document["fields"], field]}))


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    for name in ("schemas", "upcasters", "services", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return Copy(tmp_path)


def block(language: str, containing: str) -> str:
    """The one code block of the guide that holds some text."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    [found] = [one for one in blocks if containing in one]
    return str(found)


def counted(copy: Copy, version: int) -> dict[str, object]:
    given = json.dumps([value.hex() for value in OLD_VALUES])
    answer = copy.run("-c", COUNTS, str(version), given=given)
    assert answer.returncode == 0, answer.stderr
    return dict(json.loads(answer.stdout))


def test_the_guide_leads_to_a_fourth_version_that_reads_all_others(copy: Copy) -> None:
    begun = copy.tidemeter("schemas", "new-version", "usage_event")
    assert begun.returncode == 0, begun.stderr
    unit_test = "tests/unit/test_usage_event_v3_to_v4.py"
    assert unit_test in begun.stdout
    assert copy.starts().endswith("the new version must also rename a field or the record")

    field = json.loads(block("json", '"region"'))
    copy.add_field("schemas/usage_event/v4.avsc", field)
    assert "usage_event/4 is above the current version 3" in copy.starts()
    proposed = copy.tidemeter("schemas", "check", "schemas/usage_event/v4.avsc", "--subject", "usage_event")
    assert proposed.returncode == 1
    assert "field_added_without_default" in proposed.stdout

    copy.edit("schemas/catalog.py", '"usage_event": 3', '"usage_event": 4')
    assert "schemas/LOCK" in copy.starts()
    assert copy.run("-m", "schemas.catalog").returncode == 0
    assert copy.starts() == "upcasters.chain.ChainError: usage_event v3→v4: the step is missing"

    copy.edit(
        "upcasters/chain.py",
        "usage_event_v2_to_v3, values",
        "usage_event_v2_to_v3, usage_event_v3_to_v4, values",
    )
    copy.edit(
        "upcasters/chain.py",
        "usage_event_v2_to_v3, usage_delta",
        "usage_event_v2_to_v3, usage_event_v3_to_v4, usage_delta",
    )
    assert "v1-release-0.1.avro: UpcasterFailed: usage_event v3→v4" in copy.starts()
    assert copy.run("-m", "pytest", "-q", "-p", "no:cacheprovider", unit_test).returncode == 1

    (copy.root / "upcasters/usage_event_v3_to_v4.py").write_text(block("python", "SUBJECT, FROM, TO"))
    assert copy.starts().endswith("schemas/usage_event/corpus has no v4-*.avro")
    assert copy.run("-c", block("python", "fastavro.writer")).returncode == 0
    assert copy.run("-m", "schemas.catalog").returncode == 0
    assert copy.starts() == ""

    copy.edit("services/wire/topics.py", '3: "usage.v3"', '3: "usage.v3", 4: "usage.v4"')
    region = '"source": source,\n        "region": event.properties.get("region", ""),'
    copy.edit("services/wire/usage.py", '"source": source,', region)
    copy.edit(unit_test, "{**V3}", '{**V3, "region": ""}')
    assert copy.run("-m", "pytest", "-q", "-p", "no:cacheprovider", unit_test).returncode == 0

    found = counted(copy, 4)
    assert found["steps"] == ["usage_event v1→v2", "usage_event v2→v3", "usage_event v3→v4"]
    assert found["read"] == [[1, 0, "eu-west"]] * 4
    assert found["id"] == event_id_hash("acme", "evt-1").hex()
    listed = json.loads(copy.tidemeter("schemas", "list", "--json").stdout)
    assert listed["holds"] and listed["schemas"][0]["upcasts"] == "v1 → v2 → v3 → v4"
    assert listed["schemas"][3]["topic"] == "usage.v4"
    with pytest.raises(UnknownSchema):  # an older release: this one
        Decoder().decode(bytes.fromhex(str(found["value"])))


def test_the_guide_leads_to_a_revision_that_reads_older_records_with_its_default(copy: Copy) -> None:
    shutil.copy(copy.root / "schemas/usage_event/v3.avsc", copy.root / "schemas/usage_event/v3.1.avsc")
    field = {**json.loads(block("json", '"region"')), "default": "nowhere"}
    copy.add_field("schemas/usage_event/v3.1.avsc", field)
    proposed = copy.tidemeter("schemas", "check", "schemas/usage_event/v3.1.avsc", "--subject", "usage_event")
    assert proposed.returncode == 0, proposed.stdout
    assert "schemas/LOCK" in copy.starts()
    assert copy.run("-m", "schemas.catalog").returncode == 0
    assert "InvalidAfterUpcast: usage_event v2→v3" in copy.starts()

    region = '"source": "upcast/2",\n        "region": record["attributes"].get("region", ""),'
    copy.edit("upcasters/usage_event_v2_to_v3.py", '"source": "upcast/2",', region)
    assert copy.starts() == ""
    region = '"source": source,\n        "region": event.properties.get("region", ""),'
    copy.edit("services/wire/usage.py", '"source": source,', region)

    found = counted(copy, 3)
    assert found["steps"] == ["usage_event v1→v2", "usage_event v2→v3"]
    assert found["read"] == [[1, 0, "eu-west"], [1, 0, "eu-west"], [1, 0, "nowhere"], [1, 0, "eu-west"]]
    listed = json.loads(copy.tidemeter("schemas", "list", "--json").stdout)["schemas"]
    assert [(one["version"], one["current"]) for one in listed[2:4]] == [("3", False), ("3.1", True)]
    with pytest.raises(UnknownSchema):  # an older release: this one
        Decoder().decode(bytes.fromhex(str(found["value"])))


def test_a_revision_that_avro_does_not_bridge_does_not_start(copy: Copy) -> None:
    shutil.copy(copy.root / "schemas/usage_event/v3.avsc", copy.root / "schemas/usage_event/v3.1.avsc")
    copy.add_field("schemas/usage_event/v3.1.avsc", json.loads(block("json", '"region"')))
    assert copy.run("-m", "schemas.catalog").returncode == 0
    assert "usage_event/3.1 cannot be a revision beside usage_event/3: region" in copy.starts()


def test_what_an_older_release_cannot_read_is_parked_whole() -> None:
    from services.counters.prepare import Preparer
    from upcasters.chain import upcasters

    value = b"\xc3\x01" + b"newschem" + OLD_VALUES[2][10:]
    prepared = Preparer(Decoder(), upcasters()).prepare(chunk_of([value]), configuration())
    [parked] = prepared.parked
    assert (parked.outcome, parked.reason) == ("upcast_failed", "unknown_schema")


def test_a_version_is_begun_once_and_only_in_a_source_checkout(copy: Copy) -> None:
    dry = copy.tidemeter("schemas", "new-version", "usage_delta", "--dry-run")
    assert dry.returncode == 0 and "would write schemas/usage_delta/v3.avsc" in dry.stdout
    assert not (copy.root / "schemas/usage_delta/v3.avsc").exists()
    assert copy.tidemeter("schemas", "new-version", "usage_delta").returncode == 0
    again = copy.tidemeter("schemas", "new-version", "usage_delta")
    assert again.returncode == 2 and "exists already" in again.stderr

    (copy.root / "pyproject.toml").unlink()
    installed = copy.tidemeter("schemas", "new-version", "conflict")
    assert installed.returncode == 2 and "source checkout" in installed.stderr


def test_the_beginning_of_any_version_is_code_that_passes_the_checks(copy: Copy) -> None:
    subjects = ("usage_event", "usage_delta", "conflict", "adjustment", "ops_event", "stripe_webhook")
    for subject in subjects:
        assert copy.tidemeter("schemas", "new-version", subject).returncode == 0
    written = [
        str(path)
        for subject in subjects
        for path in (
            *copy.root.glob(f"upcasters/{subject}_*.py"),
            *copy.root.glob(f"tests/unit/test_{subject}_*"),
        )
    ]
    assert len(written) >= 2 * len(subjects)
    assert copy.run("-m", "ruff", "check", *written).returncode == 0
    assert copy.run("-m", "ruff", "format", "--check", *written).returncode == 0


def test_the_guide_explains_every_step_that_is_printed(copy: Copy) -> None:
    printed = copy.tidemeter("schemas", "new-version", "usage_event", "--dry-run").stdout
    named = re.findall(r"[a-z_]+/[\w/.]+\.\w+|python -m [\w.]+|make [a-z ]+(?=,)|[A-Z]+_[A-Z]+", printed)
    assert len(named) > 10
    assert not [name for name in named if name not in GUIDE and name != "docs/evolution.md"]
