"""Whatever was written into the archive comes back, byte for byte, or is refused by the name of its file."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.archive.files import ArchivedRecord, DamagedFile, NotHeld
from services.archive.writing import Store
from tests.archiving import TP, everything, logs, write


@contextmanager
def some_store(kind: str) -> Iterator[Store]:
    if kind == "memory":
        yield Store(f"memory://{uuid.uuid4().hex}")
    else:
        with tempfile.TemporaryDirectory() as directory:
            yield Store(f"file://{directory}" if kind == "file" else directory)


@st.composite
def cuts(draw: st.DrawFn, records: list[ArchivedRecord]) -> list[tuple[int, int]]:
    """Runs that cover the records from the first to the last, one behind another."""
    first, end = records[0].offset, records[-1].offset + 1
    inner = draw(st.sets(st.integers(first + 1, end - 1), max_size=5)) if end - first > 1 else ()
    return list(pairwise([first, *sorted(inner), end]))


def fill(store: Store, records: list[ArchivedRecord], runs: list[tuple[int, int]]) -> None:
    for start, end in runs:
        write(store, [one for one in records if start <= one.offset < end], start, end - 1)


@given(data=st.data(), kind=st.sampled_from(["memory", "file", "path"]), records=logs())
def test_any_window_comes_back_byte_for_byte(
    data: st.DataObject, kind: str, records: list[ArchivedRecord]
) -> None:
    runs = data.draw(cuts(records))
    first, end = runs[0][0], runs[-1][1]
    with some_store(kind) as store:
        fill(store, records, runs)
        assert store.held(TP) == [(first, end)]
        start = data.draw(st.integers(first, end))
        stop = data.draw(st.integers(start, end))
        found = [one for batch in store.read(TP, start, stop) for one in batch]
        assert found == [one for one in records if start <= one.offset < stop]
        assert all(type(batch) is list and batch for batch in store.read(TP, first, end))


@given(data=st.data(), records=logs())
def test_a_missing_file_is_a_hole_that_is_named_before_any_record_comes(
    data: st.DataObject, records: list[ArchivedRecord]
) -> None:
    runs = data.draw(cuts(records))
    gone = data.draw(st.sampled_from(runs))
    with some_store("memory") as store:
        fill(store, records, [run for run in runs if run != gone])
        assert sum(end - start for start, end in store.held(TP)) == sum(
            end - start for start, end in runs if (start, end) != gone
        )
        with pytest.raises(NotHeld, match=rf"usage.v3/2: offsets {gone[0]} to {gone[1] - 1} are not"):
            store.read(TP, runs[0][0], runs[-1][1])
        assert everything(store) == [one for one in records if not gone[0] <= one.offset < gone[1]]


@given(data=st.data(), records=logs())
def test_where_files_overlap_each_record_comes_once(
    data: st.DataObject, records: list[ArchivedRecord]
) -> None:
    first, end = records[0].offset, records[-1].offset + 1
    with some_store("memory") as store:
        fill(store, records, data.draw(cuts(records)))
        fill(store, records, data.draw(cuts(records)))
        assert store.held(TP) == [(first, end)]
        assert everything(store) == records


@given(data=st.data(), records=logs())
def test_a_file_with_one_wrong_byte_is_refused_by_its_name_or_reads_the_same(
    data: st.DataObject, records: list[ArchivedRecord]
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        store = Store(directory)
        write(store, records)
        [file] = store.files(TP)
        path = Path(file.path)
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        try:
            assert everything(store) == records
        except DamagedFile as error:
            assert file.path in str(error)


@given(data=st.data(), records=logs())
def test_a_file_that_was_cut_anywhere_is_refused_by_its_name(
    data: st.DataObject, records: list[ArchivedRecord]
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        store = Store(directory)
        write(store, records)
        [file] = store.files(TP)
        content = Path(file.path).read_bytes()
        Path(file.path).write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        with pytest.raises(DamagedFile, match=Path(file.path).name):
            everything(store)
