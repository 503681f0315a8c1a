"""How long to wait before the next try. Pure."""

from __future__ import annotations

SHORTEST_SECONDS = 0.05


def full_jitter(attempts: int, chance: float, *, base_seconds: float, cap_seconds: float) -> float:
    """Seconds to wait after ``attempts`` failures; ``chance`` is uniform in [0, 1)."""
    ceiling = min(cap_seconds, base_seconds * 2.0 ** min(attempts - 1, 40))
    return max(SHORTEST_SECONDS, chance * ceiling)
