"""Content negotiation."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitrine.bundle.errors import ParameterError
from vitrine.service.errors import NotAcceptableError
from vitrine.service.http.answers import negotiate

OFFERED = ("application/json", "text/csv", "image/png", "image/jpeg")


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, "application/json"),
        ("", "application/json"),
        ("*/*", "application/json"),
        ("text/csv", "text/csv"),
        ("text/*", "text/csv"),
        ("image/*", "image/png"),
        ("IMAGE/JPEG", "image/jpeg"),
        ("image/png;q=0.1, image/jpeg;q=0.2", "image/jpeg"),
        ("image/png, */*;q=0.8", "image/png"),
        ("text/html,application/xhtml+xml,image/avif,image/webp,*/*;q=0.8", "application/json"),  # of a browser
        ("application/json;q=0, */*", "text/csv"),
        ("*/*;q=0.1, image/jpeg;q=0.1", "application/json"),
        ("image/*;q=1, image/png;q=0.5", "image/jpeg"),
    ],
)
def test_the_preferred_media_type_is_chosen(accept: str | None, chosen: str) -> None:
    assert negotiate(accept, OFFERED) == chosen


@pytest.mark.parametrize("accept", ["text/html", "video/*", "*/*;q=0", "application/json;q=none", "nonsense"])
def test_no_acceptable_media_type_is_an_error(accept: str) -> None:
    with pytest.raises(NotAcceptableError, match="Accept: expected one of application/json, text/csv"):
        negotiate(accept, OFFERED)


def test_a_long_accept_header_is_refused() -> None:
    assert negotiate("*/*" + ",a" * 498, OFFERED) == OFFERED[0]
    with pytest.raises(ParameterError, match="Accept: expected at most 1000 characters, found 1003"):
        negotiate("*/*" + ",a" * 500, OFFERED)


@given(st.text(max_size=60))
def test_any_accept_header_is_handled(accept: str) -> None:
    with contextlib.suppress(NotAcceptableError):
        assert negotiate(accept, OFFERED) in OFFERED
