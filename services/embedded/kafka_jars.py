"""The Kafka server's jars: fetched once from a Maven repository, pinned by checksum, then offline for ever.

Promises a directory that holds exactly the files of `kafka_lock`, each verified by SHA-256 before anyone can
see it there. Two processes never download at once; a crash half-way leaves nothing behind that is believed.
Files already in the local Maven repository are used if their checksum is right.

The lock is what jgo resolves for the broker, plus two roots of our own: the stock tools, without the Connect
runtime they also declare, and a logging backend. The three are not resolved together, because jgo treats each
root as a source of managed versions too, and the logging one would pin an older kafka-clients.

For developers: to change the version, edit KAFKA_VERSION in `kafka_lock` and call `relock()`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .errors import DownloadFailed, EmbeddedError, ToolMissing
from .java import find_java, quiet_flags, version_text
from .kafka_lock import KAFKA_JARS, KAFKA_VERSION

CACHE_VARIABLE = "TIDEMETER_CACHE_DIR"
REPOSITORY_VARIABLE = "TIDEMETER_MAVEN_REPOSITORY"
COORDINATE = f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}"

DOWNLOADS_AT_ONCE = 6
ATTEMPTS_PER_JAR = 3
RETRY_PAUSE_S = 0.5
HTTP_TIMEOUT_S = 20
LOCK_TIMEOUT_S = 600.0
LOCK_POLL_S = 0.2

TOOL_JVM_FLAGS = ("-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dlog4j2.level=WARN")

Progress = Callable[[str], None]


def cache_root() -> Path:
    """Where downloads are kept: TIDEMETER_CACHE_DIR, else ~/.cache/tidemeter."""
    configured = os.environ.get(CACHE_VARIABLE)
    return Path(configured).expanduser().absolute() if configured else Path.home() / ".cache" / "tidemeter"


def jars_directory() -> Path:
    """Where the jars of the pinned version belong; it need not exist yet."""
    return cache_root() / f"kafka-{KAFKA_VERSION}"


def kafka_jars() -> Path:
    """The directory of the verified jars, fetched first if need be (46 MB, some seconds).

    Raises DownloadFailed, saying what to do, if they cannot be fetched or are not what was pinned.
    """
    target = jars_directory()
    if _is_complete(target):
        return target
    with _download_lock(target):
        if not _is_complete(target):  # the process we waited for may have done it
            _fetch_into(target)
    return target


def kafka_tool(main_class: str, *arguments: str) -> list[str]:
    """The command line that runs one of Kafka's own tools, from the same jars, with the same Java.

    For example ``kafka_tool("org.apache.kafka.tools.TopicCommand", "--bootstrap-server", "…", "--list")``.
    Raises ToolMissing without a Java, DownloadFailed without the jars.
    """
    return [*short_lived_jvm(find_java(), kafka_jars()), main_class, *arguments]


def short_lived_jvm(java: Path, jars: Path) -> list[str]:
    """The command line of a JVM for a tool, up to the main class: starts fast, stays small."""
    archive = class_archive(java, jars)
    shared = [f"-XX:SharedArchiveFile={archive}"] if archive.is_file() else []
    return [str(java), *TOOL_JVM_FLAGS, *shared, *quiet_flags(java), "-cp", f"{jars}/*"]


def class_archive(java: Path, jars: Path) -> Path:
    """Where the archive of classes belongs for this very build of Java and these jars; it need not exist."""
    build = hashlib.sha256(f"{java.resolve()} {version_text(java)} {jars}".encode()).hexdigest()[:12]
    return cache_root() / f"{jars.name}-{build}.jsa"


def jar_name(coordinate: str) -> str:
    """File name of ``group:artifact:version``."""
    _, artifact, version = coordinate.split(":")
    return f"{artifact}-{version}.jar"


def _is_complete(directory: Path) -> bool:
    # The directory appears by one rename, so presence is proof; names guard against a user's own cleaning.
    return directory.is_dir() and all(
        (directory / jar_name(coordinate)).is_file() for coordinate, _ in KAFKA_JARS
    )


@contextlib.contextmanager
def _download_lock(target: Path) -> Iterator[None]:
    """One downloader at a time; others wait, at most ten minutes."""
    import fcntl  # not on Windows, where this package can still be imported

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(
            target.with_name(f"{target.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
    except OSError as error:
        raise DownloadFailed(_advice(f"the cache directory cannot be written: {error}")) from error
    try:
        deadline_s = time.monotonic() + LOCK_TIMEOUT_S
        told = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > deadline_s:
                    raise DownloadFailed(
                        _advice("another process has been downloading for 10 minutes")
                    ) from error
            if not told:
                _say("Kafka: waiting for another process that is downloading the jars")
                told = True
            time.sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _fetch_into(target: Path) -> None:
    """Fetch everything into a directory beside `target`, then rename it into place."""
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        jars = draft / "jars"
        jars.mkdir()
        with _progress(len(KAFKA_JARS)) as done:
            _fetch_all(KAFKA_JARS, jars, draft / "repository", done)
        if target.exists():  # incomplete, else we would not be here
            target.rename(draft / "incomplete")
        jars.rename(target)
    except EmbeddedError:
        raise
    except Exception as error:  # jgo and requests raise many kinds; the reader needs one
        raise DownloadFailed(_advice(f"{type(error).__name__}: {error}")) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _fetch_all(lock: Sequence[tuple[str, str]], jars: Path, repository: Path, done: Progress) -> None:
    context = _maven(repository)

    def fetch(entry: tuple[str, str]) -> None:
        coordinate, sha256 = entry
        _fetch_one(context, coordinate, sha256).rename(jars / jar_name(coordinate))
        done(coordinate)

    pool = ThreadPoolExecutor(DOWNLOADS_AT_ONCE, thread_name_prefix="kafka-jars")
    try:
        # One first, alone: if there is no way to the repository, that one says so at once.
        fetch(lock[0])
        for _ in pool.map(fetch, lock[1:]):
            pass
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _fetch_one(context: Any, coordinate: str, sha256: str) -> Path:
    """A file of ours with the right checksum: a copy of the local one, or a download."""
    artifact = context.create_dependency(coordinate).artifact
    ours: Path = artifact.cached_path
    local = _local_repository() / artifact.component.path_prefix / artifact.filename
    if local.is_file() and _sha256(local) == sha256:
        ours.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(local, ours)
        return ours
    for attempt in range(1, ATTEMPTS_PER_JAR + 1):
        try:
            context.resolver.download(artifact)
            break
        except Exception:
            ours.unlink(missing_ok=True)  # may be half of it
            if attempt == ATTEMPTS_PER_JAR:
                raise
            time.sleep(RETRY_PAUSE_S * attempt)
    found = _sha256(ours)
    if found != sha256:
        raise DownloadFailed(
            _advice(f"{coordinate} has SHA-256 {found}, but {sha256} is pinned; do not use it")
        )
    return ours


def _maven(repository: Path) -> Any:
    """jgo's Maven client, with the user's own jgo settings and our mirror; it writes to `repository`."""
    try:
        from jgo.config import GlobalSettings
        from jgo.maven import MavenContext, PythonResolver
    except ImportError as error:
        raise ToolMissing(
            "jgo, which fetches Kafka, is not here. Install it with `pip install 'tidemeter[embedded]'`, "
            "or use a Kafka of your own by setting TIDEMETER_KAFKA_BOOTSTRAP."
        ) from error
    mirror = os.environ.get(REPOSITORY_VARIABLE)
    remotes = {"mirror": mirror.rstrip("/")} if mirror else dict(GlobalSettings.load().repositories) or None
    return MavenContext(
        resolver=PythonResolver(), repo_cache=repository, remote_repos=remotes, timeout=HTTP_TIMEOUT_S
    )


def _local_repository() -> Path:
    from jgo.config import GlobalSettings

    return Path(GlobalSettings.load().repo_cache)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _advice(reason: str) -> str:
    return (
        f"Kafka ({COORDINATE} and {len(KAFKA_JARS) - 1} jars it needs) could not be put into "
        f"{jars_directory()}.\n"
        f"  reason:  {reason}\n"
        "  retry:   run the same command again; nothing half-done was kept\n"
        f"  mirror:  {REPOSITORY_VARIABLE}=<address of a Maven repository>, or [repositories] in the file\n"
        "           that JGO_CONFIG_FILE names; M2_REPO is a local repository to look in first\n"
        "  proxy:   HTTPS_PROXY, NO_PROXY; REQUESTS_CA_BUNDLE for a proxy with its own certificate\n"
        f"  cache:   {CACHE_VARIABLE} moves it; copied from another machine it works offline\n"
        "  without: TIDEMETER_KAFKA_BOOTSTRAP=<host:port> uses a Kafka of your own, and needs none of this"
    )


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Progress]:
    """A bar on a terminal, a line now and then elsewhere; both on standard error."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress as Bar

        with Bar(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(f"Kafka {KAFKA_VERSION}", total=total)
            yield lambda _: bar.advance(task)
        return
    counter = itertools.count(1)

    def line(_: str) -> None:
        count = next(counter)  # called from several threads
        if count == total or count % 10 == 0:
            _say(f"Kafka {KAFKA_VERSION}: {count} of {total} jars")

    _say(f"Kafka {KAFKA_VERSION}: fetching {total} jars into {jars_directory()} (once)")
    yield line


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def relock() -> None:
    """Resolve the pinned version anew and rewrite kafka_lock.py: for developers, when the version changes."""
    with tempfile.TemporaryDirectory() as scratch:
        context = _maven(Path(scratch))
        direct, transitive = context.resolver.resolve([context.create_dependency(COORDINATE)])
        artifacts = {dep.artifact.artifactId: dep.artifact for dep in [*direct, *transitive]}
        logging_version = artifacts["log4j-core"].version
        for extra in (
            f"org.apache.kafka:kafka-tools:{KAFKA_VERSION}",
            f"org.apache.logging.log4j:log4j-slf4j-impl:{logging_version}",
        ):
            artifact = context.create_dependency(extra).artifact
            artifacts[artifact.artifactId] = artifact
        if artifacts["kafka-clients"].version != KAFKA_VERSION:
            raise DownloadFailed("jgo resolved kafka-clients of another version than the broker")
        rows = sorted(
            (f"{found.groupId}:{found.artifactId}:{found.version}", _sha256(found.resolve()))
            for found in artifacts.values()
        )
    lock = Path(__file__).with_name("kafka_lock.py")
    head = lock.read_text().split("KAFKA_JARS", 1)[0]
    body = "".join(
        f'    (\n        "{coordinate}",\n        "{sha256}",\n    ),\n' for coordinate, sha256 in rows
    )
    lock.write_text(f"{head}KAFKA_JARS: tuple[tuple[str, str], ...] = (\n{body})\n")
