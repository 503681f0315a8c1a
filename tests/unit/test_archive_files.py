"""The archive's form: names, headers, holes, and what is refused."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import fastavro
import pytest

from services.archive import files
from services.archive.files import (
    SCHEMA,
    Archive,
    ArchivedRecord,
    DamagedFile,
    FileBuilder,
    NotHeld,
    StorageAway,
)
from services.archive.writing import Store
from services.streaming.chunks import Chunk, Partition
from services.wire.errors import Misconfigured, TidemeterError, Transient
from tests.archiving import TP, everything, record, write


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "archive"))


def test_the_path_says_topic_partition_and_run(store: Store, tmp_path: Path) -> None:
    write(store, [record(7), record(9)], 5, 9)
    [path] = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert path.relative_to(tmp_path).as_posix() == (
        "archive/usage.v3/2/00000000000000000005-00000000000000000009.avro"
    )


def test_a_stock_avro_reader_reads_a_file(store: Store) -> None:
    write(store, [record(5), ArchivedRecord(6, 7, None, None, (("none", None),))])  # type: ignore[arg-type]
    with Path(store.files(TP)[0].path).open("rb") as stream:
        reader = fastavro.reader(stream)
        assert reader.codec == "deflate"
        assert reader.metadata["tidemeter.topic"] == "usage.v3"
        assert reader.metadata["tidemeter.partition"] == "2"
        assert list(reader) == [
            {
                "offset": 5,
                "timestamp": 1_790_000_000_005,
                "key": b"key",
                "value": b"value",
                "headers": [{"name": "h", "value": b"1"}],
            },
            {
                "offset": 6,
                "timestamp": 7,
                "key": None,
                "value": None,
                "headers": [{"name": "none", "value": None}],
            },
        ]


def test_the_schema_is_one_that_avro_can_publish() -> None:
    assert fastavro.parse_schema(json.loads(json.dumps(SCHEMA)))["name"] == "archived_record"


def test_what_is_read_is_what_a_chunk_holds(store: Store) -> None:
    write(store, [record(5), record(6)])
    [batch] = store.read(TP, 5, 7)
    assert Chunk(TP, batch).next_offset == 7


def test_nothing_held_is_no_run_no_arrival_and_a_hole_for_who_asks(store: Store) -> None:
    assert store.held(TP) == []
    assert store.first_arrival(TP) is None
    assert store.partitions(["usage.v3"]) == []
    assert list(store.read(TP, 5, 5)) == []
    with pytest.raises(NotHeld, match="usage.v3/2: offsets 3 to 9 are not in the archive"):
        store.read(TP, 3, 10)


def test_runs_end_at_holes_and_the_first_hole_inside_a_window_is_named(store: Store) -> None:
    for first in (10, 20, 40):
        write(store, [record(first)], first, first + 9)
    assert store.held(TP) == [(10, 30), (40, 50)]
    assert store.first_arrival(TP) == 1_790_000_000_010
    for start, end, hole in (
        (0, 15, "0 to 9"),
        (25, 45, "30 to 39"),
        (45, 60, "50 to 59"),
        (5, 60, "5 to 9"),
    ):
        with pytest.raises(NotHeld, match=f"offsets {hole} are not"):
            store.read(TP, start, end)
    assert [one.offset for one in everything(store)] == [10, 20, 40]


def test_what_an_operator_is_shown_of_a_run(store: Store) -> None:
    write(store, [record(10), record(19)], 10, 19)
    write(store, [record(20)], 20, 29)
    [run] = store.runs(TP)
    assert (run.first_offset, run.next_offset, run.files) == (10, 30, 2)
    assert (run.first_arrival, run.last_arrival) == (1_790_000_000_010, 1_790_000_000_020)
    assert run.bytes == sum(Path(file.path).stat().st_size for file in store.files(TP))
    assert store.partitions(["usage.v1", "usage.v3"]) == [TP]


def test_large_files_come_in_batches(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BATCH_RECORDS", 10)
    write(store, [record(offset) for offset in range(25)])
    assert [len(batch) for batch in store.read(TP, 0, 25)] == [10, 10, 5]


@pytest.mark.parametrize(
    ("other", "run"), [(Partition("usage.v2", 2), (5, 5)), (Partition("usage.v3", 1), (5, 5)), (TP, (6, 6))]
)
def test_a_file_at_another_place_or_under_another_name_is_refused(
    store: Store, other: Partition, run: tuple[int, int]
) -> None:
    write(store, [record(5)])
    there = Path(store.directory(other)) / files.file_name(*run)
    there.parent.mkdir(parents=True, exist_ok=True)
    Path(store.files(TP)[0].path).rename(there)
    with pytest.raises(DamagedFile, match=str(there)):
        everything(store, other)


@pytest.mark.parametrize("offsets", [(5, 5), (6, 5), (4, 5), (5, 8)])
def test_offsets_that_do_not_ascend_or_lie_outside_of_the_name_are_refused(
    store: Store, offsets: tuple[int, ...]
) -> None:
    write(store, [record(offset) for offset in offsets], 5, 7)
    with pytest.raises(DamagedFile, match="comes after"):
        everything(store)


def test_a_record_too_few_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = FileBuilder(TP)
    builder.add(record(5))
    builder.records = 2
    store.put(TP, 5, 6, builder.finish(5, 6))
    with pytest.raises(DamagedFile, match="1 records where the header says 2"):
        everything(store)


@pytest.mark.parametrize("name", ["5-6.avro", f"{6:020}-{5:020}.avro", f"{5:020}-{6:020}.copy.avro"])
def test_a_name_that_says_nothing_is_refused_and_what_is_no_archive_is_left_alone(
    store: Store, name: str
) -> None:
    directory = Path(store.directory(TP))
    directory.mkdir(parents=True)
    (directory / "notes.txt").write_text("none of ours")
    assert store.held(TP) == []
    (directory / name).write_bytes(b"")
    with pytest.raises(DamagedFile, match=name):
        store.held(TP)


def test_another_schema_is_refused(store: Store) -> None:
    write(store, [record(5)])
    path = Path(store.files(TP)[0].path)
    with path.open("wb") as stream:
        fastavro.writer(stream, {"type": "record", "name": "other", "fields": []}, [{}], codec="deflate")
    with pytest.raises(DamagedFile, match=str(path)):
        everything(store)


def test_a_file_that_goes_away_while_it_is_read_is_named(store: Store) -> None:
    write(store, [record(5)])
    write(store, [record(6)])
    batches = store.read(TP, 5, 7)
    assert len(next(batches)) == 1
    Path(store.files(TP)[1].path).unlink()
    with pytest.raises(NotHeld, match=files.file_name(6, 6)):
        next(batches)


def test_leftovers_are_no_files_and_are_cleaned(store: Store) -> None:
    write(store, [record(5)])
    leftover = Path(f"{store.files(TP)[0].path}.0123.tmp")
    leftover.write_bytes(b"half")
    assert store.held(TP) == [(5, 6)]
    assert store.clean(TP) == 1
    assert not leftover.exists()
    assert store.held(TP) == [(5, 6)]


def test_a_directory_that_changes_while_it_is_listed_is_listed_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty answer would have the archiver begin anew."""
    write(store, [record(5)])
    ls, failures = store.fs.ls, [FileNotFoundError(), FileNotFoundError()]

    def flaky(*arguments: object, **options: object) -> object:
        if failures:
            raise failures.pop()
        return ls(*arguments, **options)

    monkeypatch.setattr(store.fs, "ls", flaky)
    assert store.held(TP) == [(5, 6)]
    failures += [FileNotFoundError()] * 100
    with pytest.raises(StorageAway):
        store.held(TP)


def test_a_storage_that_fails_is_waited_for(store: Store, tmp_path: Path) -> None:
    (tmp_path / "archive").write_text("a file where a directory has to be")
    with pytest.raises(StorageAway, match="does not answer"):
        write(store, [record(5)])
    assert issubclass(StorageAway, Transient)
    assert issubclass(NotHeld, TidemeterError)
    assert issubclass(DamagedFile, TidemeterError)


def test_the_root_is_a_directory_or_a_url_and_what_is_neither_is_said_at_once() -> None:
    with pytest.raises(Misconfigured, match="TIDEMETER_ARCHIVE_URL"):
        Archive("nonsense://bucket")
    root = f"memory://{uuid.uuid4().hex}/prefix/"
    write(Store(root), [record(5)])
    assert Archive(root).held(TP) == [(5, 6)]


def test_an_accepted_hole_is_remembered_where_the_files_are(store: Store) -> None:
    assert not store.accepts_hole(TP, 5)
    store.accept_hole(TP, 5, "cli:somebody")
    assert store.accepts_hole(TP, 5)
    assert not store.accepts_hole(TP, 6)
    assert store.held(TP) == []
