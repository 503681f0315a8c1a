"""A schema registry for tests: the part of Confluent's REST API that clients use to write and read Avro.

Status codes, media type and error codes are those of the API's documentation. It shares no code with the
product, keeps everything in memory, and can be told to fail: ``answer_with`` replaces every answer.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import fastavro

MEDIA_TYPE = "application/vnd.schemaregistry.v1+json"
LEVELS = {
    "NONE",
    *(f"{one}{more}" for one in ("BACKWARD", "FORWARD", "FULL") for more in ("", "_TRANSITIVE")),
}
_PROMOTIONS = {
    "int": {"long", "float", "double"},
    "long": {"float", "double"},
    "float": {"double"},
    "string": {"bytes"},
    "bytes": {"string"},
}


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


def _no_subject(name: str) -> Refused:
    return Refused(404, 40401, f"Subject '{name}' not found.")


def _no_version(number: object) -> Refused:
    return Refused(404, 40402, f"Version {number} not found.")


def _no_schema(what: object) -> Refused:
    return Refused(404, 40403, f"Schema {what} not found")


def reads(reader: Any, writer: Any) -> bool:
    """Whether every value of ``writer`` can be read as ``reader``. No references to named types."""
    if isinstance(writer, list):
        return all(reads(reader, branch) for branch in writer)
    if isinstance(reader, list):
        return any(reads(branch, writer) for branch in reader)
    ours, theirs = (one["type"] if isinstance(one, dict) else one for one in (reader, writer))
    if isinstance(ours, dict | list) or isinstance(theirs, dict | list):
        return reads(ours, theirs)
    if ours != theirs:
        return ours in _PROMOTIONS.get(theirs, ())
    if ours in ("record", "enum", "fixed") and reader["name"].split(".")[-1] != writer["name"].split(".")[-1]:
        return False
    match ours:
        case "record":
            written = {one["name"]: one["type"] for one in writer["fields"]}
            return all(
                reads(one["type"], written[one["name"]]) if one["name"] in written else "default" in one
                for one in reader["fields"]
            )
        case "enum":
            return set(writer["symbols"]) <= set(reader["symbols"]) or "default" in reader
        case "fixed":
            return bool(reader["size"] == writer["size"])
        case "array":
            return reads(reader["items"], writer["items"])
        case "map":
            return reads(reader["values"], writer["values"])
    return True


@dataclass
class RegistryServer:
    """Runs while it is a context. ``stop`` and ``start`` keep the port and what was registered."""

    credentials: str | None = None
    certificate: Path | None = None
    #: By id, as registered: text, and its type.
    schemas: dict[int, tuple[str, str]] = field(default_factory=dict)
    #: Ids of a subject's versions, in order.
    subjects: dict[str, list[int]] = field(default_factory=dict)
    levels: dict[str, str] = field(default_factory=dict)
    #: (status, body) instead of any right answer.
    answer_with: tuple[int, bytes] | None = None
    asked: list[str] = field(default_factory=list)
    port: int = 0
    connections: set[socket.socket] = field(default_factory=set)
    _server: ThreadingHTTPServer | None = None
    _thread: threading.Thread | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> RegistryServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> RegistryServer:
        handler = type("Handler", (_Handler,), {"registry": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        if self.certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            for connection in list(self.connections):  # clients keep them, and would be answered for ever
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._server.server_close()
            self._thread.join()
            self._server = self._thread = None

    @property
    def url(self) -> str:
        return f"{'http' if self.certificate is None else 'https'}://127.0.0.1:{self.port}"

    def register(self, subject: str, document: Any, kind: str = "AVRO") -> int:
        """Register without asking about compatibility; the id."""
        text = document if isinstance(document, str) else json.dumps(document)
        with self._lock:
            return self._register(subject, text, kind)

    def _register(self, subject: str, text: str, kind: str) -> int:
        same = [one for one, held in self.schemas.items() if _canonical(*held) == _canonical(text, kind)]
        number = same[0] if same else len(self.schemas) + 1
        self.schemas[number] = (text, kind)
        versions = self.subjects.setdefault(subject, [])
        if number not in versions:
            versions.append(number)
        return number

    # -- Answers -------------------------------------------------------------------------------------

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> Any:
        """What the API answers.

        Raises:
            Refused: with a status and an error code.
        """
        for verb, pattern, respond in ROUTES:
            found = re.fullmatch(pattern, path)
            if found is not None and verb == method:
                with self._lock:
                    return respond(self, *map(unquote, filter(None, found.groups())), query=query, body=body)
        raise Refused(404, 404, "HTTP 404 Not Found")

    def by_id(self, number: str, **_: Any) -> Any:
        if int(number) not in self.schemas:
            raise _no_schema(number)
        return _held(*self.schemas[int(number)])

    def list_subjects(self, **_: Any) -> Any:
        return list(self.subjects)

    def look_up(self, subject: str, body: Any, **_: Any) -> Any:
        versions = self._versions(subject)
        text, kind = _proposed(body)
        for version, number in enumerate(versions, 1):
            if _canonical(*self.schemas[number]) == _canonical(text, kind):
                return self._version_answer(subject, version)
        raise Refused(404, 40403, "Schema not found")

    def add_version(self, subject: str, body: Any, **_: Any) -> Any:
        text, kind = _proposed(body)
        known = [_canonical(*self.schemas[number]) for number in self.subjects.get(subject, ())]
        if _canonical(text, kind) not in known and not self._compatible(subject, text):
            raise Refused(409, 409, "Schema being registered is incompatible with an earlier schema")
        return {"id": self._register(subject, text, kind)}

    def list_versions(self, subject: str, **_: Any) -> Any:
        return list(range(1, len(self._versions(subject)) + 1))

    def one_version(self, subject: str, version: str, **_: Any) -> Any:
        return self._version_answer(subject, self._number(subject, version))

    def get_level(self, subject: str = "", query: Any = None, **_: Any) -> Any:
        if subject and subject not in self.levels and query.get("defaultToGlobal") != ["true"]:
            raise Refused(
                404, 40408, f"Subject '{subject}' does not have subject-level compatibility configured"
            )
        return {"compatibilityLevel": self._level(subject)}

    def set_level(self, subject: str = "", body: Any = None, **_: Any) -> Any:
        level = body.get("compatibility") if isinstance(body, dict) else None
        if level not in LEVELS:
            raise Refused(422, 42203, "Invalid compatibility level")
        self.levels[subject] = level
        return {"compatibility": level}

    def test_compatibility(self, subject: str, version: str, body: Any, **_: Any) -> Any:
        number = self._number(subject, version)
        text, _kind = _proposed(body)
        older = self.schemas[self.subjects[subject][number - 1]][0]
        return {"is_compatible": _agrees(self._level(subject), text, older)}

    def _versions(self, subject: str) -> list[int]:
        if subject not in self.subjects:
            raise _no_subject(subject)
        return self.subjects[subject]

    def _number(self, subject: str, version: str) -> int:
        versions = self._versions(subject)
        if version in ("latest", "-1"):
            return len(versions)
        if not version.isdecimal() or int(version) == 0:
            raise Refused(422, 42202, f"The specified version '{version}' is not a valid version id.")
        if int(version) > len(versions):
            raise _no_version(version)
        return int(version)

    def _version_answer(self, subject: str, version: int) -> Any:
        number = self.subjects[subject][version - 1]
        return {"subject": subject, "version": version, "id": number, **_held(*self.schemas[number])}

    def _level(self, subject: str) -> str:
        return self.levels.get(subject) or self.levels.get("", "BACKWARD")

    def _compatible(self, subject: str, text: str) -> bool:
        level = self._level(subject)
        older = self.subjects.get(subject, [])
        if not level.endswith("_TRANSITIVE"):
            older = older[-1:]
        return all(_agrees(level, text, self.schemas[number][0]) for number in older)


ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", r"/schemas/ids/([0-9]+)", RegistryServer.by_id),
    ("GET", r"/subjects", RegistryServer.list_subjects),
    ("POST", r"/subjects/([^/]+)", RegistryServer.look_up),
    ("POST", r"/subjects/([^/]+)/versions", RegistryServer.add_version),
    ("GET", r"/subjects/([^/]+)/versions", RegistryServer.list_versions),
    ("GET", r"/subjects/([^/]+)/versions/([^/]+)", RegistryServer.one_version),
    ("GET", r"/config(?:/([^/]+))?", RegistryServer.get_level),
    ("PUT", r"/config(?:/([^/]+))?", RegistryServer.set_level),
    ("POST", r"/compatibility/subjects/([^/]+)/versions/([^/]+)", RegistryServer.test_compatibility),
]


def _held(text: str, kind: str) -> dict[str, str]:
    return {"schema": text} if kind == "AVRO" else {"schema": text, "schemaType": kind}


def _canonical(text: str, kind: str) -> tuple[str, str]:
    """Two texts of one schema, docs and all, are the same; the order of their attributes does not matter."""
    return (json.dumps(json.loads(text), sort_keys=True) if kind == "AVRO" else text), kind


def _proposed(body: Any) -> tuple[str, str]:
    text = body.get("schema") if isinstance(body, dict) else None
    kind = body.get("schemaType", "AVRO") if isinstance(body, dict) else ""
    try:
        if kind == "AVRO":
            fastavro.parse_schema(json.loads(text))  # type: ignore[arg-type]
        elif not isinstance(text, str):
            raise ValueError
    except Exception:
        raise Refused(422, 42201, "Invalid schema") from None
    return str(text), str(kind)


def _agrees(level: str, text: str, older: str) -> bool:
    new, old = json.loads(text), json.loads(older)
    name = level.removesuffix("_TRANSITIVE")
    return (name not in ("BACKWARD", "FULL") or reads(new, old)) and (
        name not in ("FORWARD", "FULL") or reads(old, new)
    )


class _Handler(BaseHTTPRequestHandler):
    registry: ClassVar[RegistryServer]
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.registry.connections.add(self.connection)

    def finish(self) -> None:
        self.registry.connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.registry.asked.append(f"{self.command} {parts.path}")
        if self.registry.answer_with is not None:
            self._send(*self.registry.answer_with)
            return
        try:
            self._authorise()
            given = json.loads(body) if body else None
            answer = self.registry.answer(self.command, parts.path, parse_qs(parts.query), given)
            self._send(200, json.dumps(answer).encode())
        except Refused as refusal:
            told = {"error_code": refusal.code, "message": refusal.message}
            self._send(refusal.status, json.dumps(told).encode())
        except ValueError:
            self._send(400, b'{"error_code": 400, "message": "Unrecognized JSON"}')

    do_GET = do_POST = do_PUT = _serve

    def _authorise(self) -> None:
        if self.registry.credentials is None:
            return
        expected = "Basic " + base64.b64encode(self.registry.credentials.encode()).decode()
        if self.headers.get("Authorization") != expected:
            raise Refused(401, 401, "Unauthorized")

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", MEDIA_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: it would be the test's output."""
