"""Watch the event loop: while it is busy, or waits for Python's lock, no request is answered, not even a probe."""

import asyncio
import time

from vitrine.service.observability import metrics

_INTERVAL = 0.01  # seconds
_WINDOW = 30.0  # seconds


async def watch_event_loop() -> None:
    """Measure for how long the event loop stands still, until cancelled: how late it wakes this task up."""
    longest = before = 0.0
    window_end = time.monotonic() + _WINDOW
    while True:
        start = time.monotonic()
        await asyncio.sleep(_INTERVAL)
        now = time.monotonic()
        stall = max(now - start - _INTERVAL, 0.0)
        if now > window_end:
            longest, before, window_end = 0.0, longest, now + _WINDOW
        longest = max(longest, stall)
        metrics.observe_stall(stall, max(longest, before))
