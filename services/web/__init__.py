"""What processes that serve HTTP share: keys, bounds, problems, health, metrics."""

from __future__ import annotations
