"""What the application does besides answering requests."""

import asyncio
import logging

import pytest

from vitrine.service import app


def test_a_background_duty_that_fails_is_logged_and_begins_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(app, "_DUTY_PAUSE_SECONDS", 0.0)
    outcomes = iter([RuntimeError("can't start new thread"), None])

    async def duty() -> None:
        if error := next(outcomes, asyncio.CancelledError()):
            raise error

    with caplog.at_level(logging.ERROR), pytest.raises(asyncio.CancelledError):
        asyncio.run(app._perform(duty))
    assert "a background duty failed" in caplog.text
    assert "can't start new thread" in caplog.text
