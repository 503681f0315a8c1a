"""A TCP proxy in front of one Kafka broker that can be cut, silenced and restored.

A Kafka client learns the broker's own address from its metadata and would go around a plain proxy. So answers
pass here one frame at a time, and the broker's ``host, port`` in them is replaced by the proxy's port.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading


class KafkaProxy:
    """Listens on ``bootstrap``; use as a context manager."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        own_port = self._listener.getsockname()[1]
        self.bootstrap = f"{host}:{own_port}"
        self._theirs = host.encode() + struct.pack(">i", int(port))
        self._ours = host.encode() + struct.pack(">i", own_port)
        self._open: set[socket.socket] = set()
        self._cut = self._mute = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Close every connection, and each new one at once."""
        self._cut = True
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mute(self) -> None:
        """Pass requests on, but drop every answer: the broker writes and the client never learns."""
        self._mute = True

    def restore(self) -> None:
        """Work again. Connections that were muted are closed, for answers are missing in them."""
        if self._mute:
            self.cut()
        self._cut = self._mute = False

    def __enter__(self) -> KafkaProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self._cut:
                    client.close()
                    continue
                broker = socket.create_connection(self._target)
                self._open |= {client, broker}
                threading.Thread(target=self._pass, args=(client, broker, False), daemon=True).start()
                threading.Thread(target=self._pass, args=(broker, client, True), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError), source.makefile("rb") as stream:
            while len(head := stream.read(4)) == 4:
                frame = head + stream.read(int.from_bytes(head, "big"))
                if answers and not self._mute:
                    sink.sendall(frame.replace(self._theirs, self._ours))
                elif not answers:
                    sink.sendall(frame)
        for end in (source, sink):
            self._open.discard(end)
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class TcpProxy(KafkaProxy):
    """The same for a server whose protocol names no addresses, such as PostgreSQL."""

    def _pass(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not (answers and self._mute):
                    sink.sendall(data)
        for end in (source, sink):
            self._open.discard(end)
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
