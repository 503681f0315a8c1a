"""The operators' part of the HTTP API: what waits for a person, and what a person decides.

Reads   PostgreSQL.
Writes  decisions: states and requests, each with who made it. Carrying them out is the part of the service
        that owns the data.
Promises a tenant's key sees and decides what is its own tenant's, and nothing else.
Fails   closed: PostgreSQL away is 503.

Served by the same process as the ingest API.
"""

from __future__ import annotations
