"""One real Kafka node, broker and controller in one JVM, on loopback; alone, or one of a cluster.

Promises: the same addresses and the same data at every start; nobody but this machine can connect; ready
means that a client got its metadata; `kill()` loses nothing that was acknowledged (the page cache outlives
the JVM). It does not promise to survive a power cut: one replica, and Kafka does not fsync each record.
A node of a cluster is ready once enough others are up for it to serve: start them at the same time.

The JVM's flags, measured on two cores (Java 17 and 25): the serial collector serves as many records as G1,
with a quarter less memory. Both compilers stay: with the quick one alone a start is shorter by 0.6 s, but
each record costs twice the processor once the broker is warm. What does help the start is an archive of the
classes it loads (CDS): 2.9 s become 1.6 s.
"""

from __future__ import annotations

import base64
import os
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import processes
from .errors import EmbeddedError
from .java import find_java, quiet_flags
from .kafka_jars import class_archive, kafka_jars, short_lived_jvm
from .processes import LOOPBACK, Launch
from .server import EmbeddedServer

NODE_ID = 1
HEAP_MB = 768
FORMAT_TIMEOUT_S = 60.0
METADATA_TIMEOUT_S = 2.0
ARCHIVE_TIMEOUT_S = 60.0
EXIT_SIGTERM = 143  # how a JVM ends when asked to

SERVER_PROPERTIES = """\
process.roles={roles}
node.id={node_id}
controller.quorum.voters={voters}
listeners={listeners}
advertised.listeners=CLIENT://{host}:{port}
listener.security.protocol.map=CLIENT:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=CLIENT
controller.listener.names=CONTROLLER
log.dirs={log_dir}

auto.create.topics.enable=false
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
# After a SIGKILL the controller lets the broker back in only when its old session is over (9 s by default).
broker.heartbeat.interval.ms=500
broker.session.timeout.ms=3000

default.replication.factor={replicas}
min.insync.replicas={in_sync}
offsets.topic.replication.factor={replicas}
offsets.topic.num.partitions=4
transaction.state.log.replication.factor={replicas}
transaction.state.log.min.isr={in_sync}
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor={replicas}
share.coordinator.state.topic.min.isr={in_sync}
share.coordinator.state.topic.num.partitions=1

num.network.threads=2
num.io.threads=4
background.threads=2
log.cleaner.dedupe.buffer.size=16777216
"""

LOG4J2_PROPERTIES = """\
status = error
appender.file.type = RollingFile
appender.file.name = file
appender.file.fileName = {log}
appender.file.filePattern = {log}.%i
appender.file.layout.type = PatternLayout
appender.file.layout.pattern = %d %p %c: %m%n
appender.file.policies.type = Policies
appender.file.policies.size.type = SizeBasedTriggeringPolicy
appender.file.policies.size.size = 8MB
appender.file.strategy.type = DefaultRolloverStrategy
appender.file.strategy.max = 2
rootLogger.level = warn
rootLogger.appenderRef.file.ref = file
"""


@dataclass(frozen=True, slots=True)
class Membership:
    """A node's place in a cluster of ``size`` brokers, 3 or more. Internal topics then have three replicas.

    ``controllers`` are the ports of those nodes that are controllers, too, by their ids; ``cluster_id`` is
    the same for all.
    """

    node_id: int
    size: int
    controllers: Mapping[int, int]
    cluster_id: str


@dataclass(frozen=True, slots=True)
class _Archiving:
    """The making of a class archive: what to run, from which list, into which draft of which file."""

    launch: Launch
    classes: Path
    draft: Path
    archive: Path


class EmbeddedKafka(EmbeddedServer):
    """A Kafka server whose life is bound to this process.

    `directory` holds its data, ports, cluster id and logs. `port` and `controller_port` are chosen and
    remembered if None. `heap_mb` is the JVM's maximum heap in mebibytes; `jvm_flags` come after our own.
    `membership` makes it one node of a cluster. `archive_classes` says whether the first orderly stop makes
    the class archive if there is none: it takes some seconds, so None means only if somebody sits at a
    terminal.
    """

    title = "Kafka"
    stop_signal = signal.SIGTERM
    start_timeout_s = 60.0
    stop_grace_s = 15.0
    stale_grace_s = 5.0

    def __init__(
        self,
        directory: Path,
        *,
        port: int | None = None,
        controller_port: int | None = None,
        heap_mb: int = HEAP_MB,
        jvm_flags: Sequence[str] = (),
        archive_classes: bool | None = None,
        membership: Membership | None = None,
    ) -> None:
        super().__init__(directory)
        self.membership = membership
        self.heap_mb = heap_mb
        self.jvm_flags = tuple(jvm_flags)
        self._given_port = port
        self._given_controller_port = controller_port
        self._port: int | None = None
        self._archive_classes = archive_classes
        self._archiving: _Archiving | None = None
        self._served = False

    @property
    def bootstrap(self) -> str:
        """Address for clients, ``127.0.0.1:port``. Raises EmbeddedError before the first start."""
        if self._port is None:
            raise EmbeddedError("Kafka has not been started")
        return f"{LOOPBACK}:{self._port}"

    @property
    def node_id(self) -> int:
        """What it is called in its cluster."""
        return self.membership.node_id if self.membership else NODE_ID

    @property
    def logs(self) -> list[Path]:
        """The server's own log (warnings and worse), and what the JVM printed."""
        return [self.directory / "server.log", self.directory / "kafka.out"]

    def require_tools(self) -> None:
        """Find Java and the jars, fetching those once. Raises ToolMissing or DownloadFailed."""
        find_java()
        kafka_jars()

    def _configure(self) -> Launch:
        java, jars = find_java(), kafka_jars()
        self._served = False
        self._port = processes.choose_port(self._given_port, self.directory / "port")
        properties = self.directory / "server.properties"
        processes.write_text(properties, self._properties(self._port))
        log4j = self.directory / "log4j2.properties"
        processes.write_text(
            log4j, LOG4J2_PROPERTIES.format(log=_in_properties(self.directory / "server.log"))
        )
        command = [str(java), f"-Xmx{self.heap_mb}m", "-XX:+UseSerialGC", "-Djava.awt.headless=true"]
        command += [f"-Dlog4j2.configurationFile={log4j.as_uri()}", *quiet_flags(java), "-cp", f"{jars}/*"]
        self._format([*short_lived_jvm(java, jars), "kafka.tools.StorageTool"], properties)
        flags = [*self._archive_flags(java, jars), *self.jvm_flags]
        return self._launch("kafka", [command[0], *flags, *command[1:], "kafka.Kafka", str(properties)])

    def _properties(self, port: int) -> str:
        if (member := self.membership) is None:
            controllers, size = {NODE_ID: self._controller_port(port)}, 1
        else:
            controllers, size = dict(member.controllers), member.size
        own = controllers.get(self.node_id)
        listeners = [f"CLIENT://{LOOPBACK}:{port}"]
        if own is not None:
            listeners.append(f"CONTROLLER://{LOOPBACK}:{own}")
        return SERVER_PROPERTIES.format(
            roles="broker" if own is None else "broker,controller",
            node_id=self.node_id,
            voters=",".join(f"{node}@{LOOPBACK}:{at}" for node, at in controllers.items()),
            listeners=",".join(listeners),
            host=LOOPBACK,
            port=port,
            log_dir=_in_properties(self.directory / "data"),
            replicas=min(3, size),
            in_sync=2 if size >= 3 else 1,
        )

    def _controller_port(self, port: int) -> int:
        return processes.choose_port(
            self._given_controller_port, self.directory / "controller_port", taken=[port]
        )

    def _format(self, tool: list[str], properties: Path) -> None:
        """Prepare the data directory, once; the cluster id is ours and kept beside it."""
        if (self.directory / "data" / "meta.properties").is_file():
            return
        identity = self.directory / "cluster_id"
        if not identity.is_file():
            cluster_id = self.membership.cluster_id if self.membership else new_cluster_id()
            processes.write_text(identity, cluster_id + "\n")
        arguments = ["format", "--ignore-formatted", "--cluster-id", identity.read_text().strip()]
        arguments += ["--config", str(properties)]
        launch = self._launch("format", [*tool, *arguments])
        self._run(launch, FORMAT_TIMEOUT_S)

    def _archive_flags(self, java: Path, jars: Path) -> list[str]:
        """Use the class archive of this Java and these jars; or note the classes, to make one."""
        archive = class_archive(java, jars)
        if archive.is_file():
            return [f"-XX:SharedArchiveFile={archive}"]
        wanted = sys.stderr.isatty() if self._archive_classes is None else self._archive_classes
        if not wanted:
            return []
        classes = self.directory / "classes.list"
        draft = archive.with_name(f".{archive.name}.{os.getpid()}")
        command = [str(java), "-Xshare:dump", "-XX:+UseSerialGC", "-Xlog:disable", "-Xlog:all=error:stderr"]
        command += [f"-XX:SharedClassListFile={classes}", f"-XX:SharedArchiveFile={draft}"]
        command += [*quiet_flags(java), "-cp", f"{jars}/*"]
        self._archiving = _Archiving(self._launch("archive", command), classes, draft, archive)
        return [f"-XX:DumpLoadedClassList={classes}"]

    def _complete(self) -> None:
        self._served = True

    def _stopped(self, status: int) -> None:
        """After the first orderly stop, make the archive: some seconds, once."""
        work, self._archiving = self._archiving, None
        served, self._served = self._served, False
        if work is None or not served or status != EXIT_SIGTERM:
            return
        sys.stderr.write("Kafka: preparing faster starts (once, some seconds; Ctrl-C skips it)\n")
        try:
            self._run(work.launch, ARCHIVE_TIMEOUT_S)
            work.draft.rename(work.archive)
        except (EmbeddedError, OSError):
            work.draft.unlink(missing_ok=True)  # it was only ever a matter of speed
        finally:
            work.classes.unlink(missing_ok=True)

    def _launch(self, name: str, command: list[str]) -> Launch:
        passed_on = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR") if key in os.environ}
        return Launch(
            command=command,
            marker=str(self.directory),
            directory=self.directory,
            name=name,
            environment={**passed_on, "LC_ALL": "C.UTF-8"},
        )

    def _answers(self) -> bool:
        """Does a client get metadata that names this broker?"""
        if self._port is None or not processes.listens(self._port):
            return False
        from confluent_kafka import KafkaException
        from confluent_kafka.admin import AdminClient

        settings: dict[str, Any] = {"bootstrap.servers": self.bootstrap, "log_level": 0, "error_cb": _ignore}
        client = AdminClient(settings)
        try:
            brokers = client.list_topics(timeout=METADATA_TIMEOUT_S).brokers
        except KafkaException:
            return False
        return self.node_id in brokers


def _ignore(_: object) -> None:
    """What librdkafka has to say while the server is not up yet."""


def _in_properties(path: Path) -> str:
    """A path as a value in a Java properties file. Raises EmbeddedError for a comma: Kafka splits there."""
    if "," in str(path):
        raise EmbeddedError(f"Kafka cannot keep data under a path with a comma: {path}")
    units = str(path).replace("\\", "\\\\").encode("utf-16-be")
    codes = [int.from_bytes(units[at : at + 2], "big") for at in range(0, len(units), 2)]
    return "".join(chr(code) if 0x20 < code < 0x7F else f"\\u{code:04x}" for code in codes)


def new_cluster_id() -> str:
    """A random id in Kafka's notation, never with a leading dash, which its tools take for an option."""
    while (text := base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")).startswith("-"):
        continue
    return text
