"""Feed the decoder whatever finds a new way through it, with atheris (https://github.com/google/atheris).

    pip install atheris
    python tests/fuzz/fuzz_decoder.py -max_total_time=60

The first byte of an input chooses a released schema, and the rest is the body of a value that claims it;
after a byte beyond the last schema comes a whole value. It starts from the corpus of every release.
atheris is no dependency: without it only :func:`check` and :func:`seeds` can be used, and a test does.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

try:
    import atheris
except ImportError:
    atheris = None

if atheris is None:
    from services.wire import codec
else:
    with atheris.instrument_imports(include=["services.wire"]):
        from services.wire import codec

import fastavro  # noqa: E402

from schemas.catalog import ROOT, writers  # noqa: E402
from services.wire.errors import Undecodable, UnknownSchema  # noqa: E402

SCHEMAS = writers()
DECODER = codec.Decoder()


class Found(Exception):
    """The decoder did something that it promises not to do."""


def check(data: bytes) -> bool:
    """Decode one input; whether it was a record.

    Raises:
        Found: a record that is not what fastavro reads, or does not come back when it is written again.
        Exception: anything but the two refusals came out of the decoder.
    """
    if data and data[0] < len(SCHEMAS):
        value = codec.SINGLE_OBJECT_MAGIC + SCHEMAS[data[0]].fingerprint + data[1:]
    else:
        value = data[1:]
    try:
        schema, record = DECODER.decode(value)
    except (Undecodable, UnknownSchema):
        return False
    written, start = DECODER.schema_of(value)
    theirs = fastavro.schemaless_reader(io.BytesIO(value[start:]), written.plain, schema.plain)
    if _text(theirs) != _text(record):
        raise Found("fastavro reads another record")
    if _text(codec.read_body(schema, codec.write_body(schema, record))) != _text(record):
        raise Found("written again, it is another record")
    return True


def _text(record: Any) -> str:
    """Records are compared as text, in which NaN is NaN."""
    return repr(sorted(record.items()))


def seeds() -> Iterator[bytes]:
    """An input for every corpus record, and one for every schema that has none yet."""
    for number, schema in enumerate(SCHEMAS):
        files = sorted((ROOT / schema.subject / "corpus").glob(f"v{schema.version}-*.avro"))
        for path in files:
            with path.open("rb") as stream:
                for record in fastavro.reader(stream, reader_schema=schema.plain):
                    yield bytes([number]) + codec.write_body(schema, dict(record))
        if not files:
            record = {field["name"]: _some(field["type"]) for field in schema.plain["fields"]}
            yield bytes([number]) + codec.write_body(schema, record)


def _some(kind: Any) -> Any:
    """A value of a plain type."""
    if isinstance(kind, list):
        return _some(kind[1])
    if isinstance(kind, dict) and kind["type"] == "fixed":
        return bytes(kind["size"])
    if isinstance(kind, dict) and kind["type"] == "enum":
        return kind["symbols"][0]
    name = kind["type"] if isinstance(kind, dict) else kind
    return {"map": {"k": "v"}, "array": ["i"], "string": "t", "bytes": b"b", "double": 0.5}.get(name, 1)


def fuzz() -> None:
    """Run until libFuzzer's own options say stop."""
    # Readers are compiled from schemas at run time, so the import has not instrumented them.
    for _, reader in DECODER._prefixes.values():
        atheris.instrument_func(reader)
    with tempfile.TemporaryDirectory(prefix="tidemeter-fuzz-") as directory:
        for number, seed in enumerate(seeds()):
            (Path(directory) / f"seed-{number}").write_bytes(seed)
        atheris.Setup([*sys.argv, directory], check_one)
        atheris.Fuzz()


def check_one(data: bytes) -> None:
    """As atheris calls it, which has no use for the answer."""
    check(data)


if __name__ == "__main__":
    if atheris is None:
        sys.exit("atheris is not installed: pip install atheris")
    fuzz()
