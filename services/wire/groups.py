"""Names of the consumer groups, for whoever looks at them without doing their work."""

from __future__ import annotations

from typing import Final

COUNTERS: Final = "tidemeter-counters"
PUSHER: Final = "tidemeter-pusher"
NOTIFIER: Final = "tidemeter-notifier"
