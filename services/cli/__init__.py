"""The ``tidemeter`` command: starts the services, and asks and tells a running system.

Exit status of every command: 0 done, 1 done but something needs attention, 2 misused or misconfigured,
3 a server is not reachable, 130 interrupted.
"""
