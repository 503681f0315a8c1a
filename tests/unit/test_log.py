"""What a log line may hold."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

PROGRAM = """
import logging, structlog
from services.wire.log import configure_logging
configure_logging("info", "json", service="test")
try:
    raise ValueError("planted-secret")
except ValueError as error:
    structlog.get_logger("ours").critical("failed", error=error, exc_info=error)
    logging.getLogger("foreign").exception("failed too")
"""


def test_an_exception_is_logged_by_class_and_place_and_never_by_its_message() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert "planted-secret" not in done.stderr + done.stdout
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["error"] for line in lines] == ["ValueError", "ValueError"]
    assert all(line["frames"] for line in lines)
    assert lines[0]["level"] == logging.getLevelName(logging.CRITICAL).lower()
