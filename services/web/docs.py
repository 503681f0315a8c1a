"""Documentation of answers that a framework cannot derive."""

from __future__ import annotations

from typing import Any

from litestar.openapi.datastructures import ResponseSpec


def documented(description: str, container: Any) -> ResponseSpec:
    """An answer with a body of type ``container``."""
    return ResponseSpec(data_container=container, description=description, generate_examples=False)
