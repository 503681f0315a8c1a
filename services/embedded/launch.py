"""The last step before a server runs: tie its life to ours, give up root if asked, then become it.

Run as a script by a bare interpreter, in the process that will *be* the server (same pid); imports nothing
of ours. Promises that the kernel kills the server when its owner dies, however it dies, and that the server
does not run as root when an ordinary user is named. The first is Linux only; elsewhere a pid file has to do.

Why a script and not ``preexec_fn``: that one runs Python between fork and exec of a process that has
threads, where any lock may be held for ever. Here there is one thread and nothing to inherit.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
PR_SET_KEEPCAPS = 8
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2
CAPABILITY_VERSION_3 = 0x20080522
EXIT_REFUSED = 126


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Sets(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


def main(arguments: list[str]) -> None:
    """`arguments`: owner pid, uid or "-", gid or "-", needed paths joined by os.pathsep, the command."""
    owner, uid, gid, needs, *command = arguments
    libc = ctypes.CDLL(None, use_errno=True)
    linux = sys.platform == "linux"
    if uid != "-":
        become(libc if linux else None, int(uid), int(gid), needs.split(os.pathsep))
    if linux:
        # After the change of user, which would clear it; before the check, or the owner could die in between.
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(owner):
        refuse("its owner died while it was starting")
    os.execv(command[0], command)  # noqa: S606 - no shell is the point


def become(libc: ctypes.CDLL | None, uid: int, gid: int, needs: list[str]) -> None:
    """Become `uid`/`gid`; keep the right to enter other users' directories only if `needs` are out of reach.

    So nobody has to open up a home directory for the sake of a server under it. `libc` is None where there
    are no Linux capabilities.
    """
    if libc is not None:
        libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
    unreachable = [path for path in needs if not os.access(path, os.R_OK | os.X_OK)]
    if not unreachable:
        return
    if libc is None or not (keep(libc, CAP_DAC_READ_SEARCH) or keep(libc, CAP_DAC_OVERRIDE)):
        refuse(
            f"uid {uid} cannot reach {unreachable[0]}, and root may not lend it the right to; "
            "set TIDEMETER_DATA_DIR to a directory other users can enter, or run as an ordinary user"
        )


def keep(libc: ctypes.CDLL, capability: int) -> bool:
    """Make `capability`, and no other, survive the exec; False if the kernel refuses."""
    header = _Header(CAPABILITY_VERSION_3, 0)
    bit = 1 << capability
    sets = (_Sets * 2)(_Sets(bit, bit, bit), _Sets(0, 0, 0))
    if libc.capset(ctypes.byref(header), sets) != 0:
        return False
    return bool(libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0) == 0)


def refuse(reason: str) -> None:
    """Say why on standard error, which is the server's log, and exit with 126."""
    os.write(2, f"not started: {reason}\n".encode())
    os._exit(EXIT_REFUSED)


if __name__ == "__main__":
    main(sys.argv[1:])
