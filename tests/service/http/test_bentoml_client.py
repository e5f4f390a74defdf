"""BentoML's own client, unmodified."""

from pathlib import Path

import bentoml
import httpx
import pytest
from bentoml.exceptions import BentoMLException


def test_the_client_gets_the_same_responses(server: str, photograph: bytes, tmp_path: Path) -> None:
    image = tmp_path / "photograph.jpg"
    image.write_bytes(photograph)
    with bentoml.SyncHTTPClient(server) as client:
        classified = client.classify(image=image, model="colours", top_k=2, labels=["red", "blue"])
        detected = client.detect(image=image, threshold=0.0, variant="int8-dynamic")
    query = "model=colours&top_k=2&labels=red,blue"
    assert classified == httpx.post(f"{server}/classify?{query}", content=photograph).json()
    assert detected == httpx.post(f"{server}/detect?threshold=0&variant=int8-dynamic", content=photograph).json()


def test_the_client_gets_the_error_message(server: str, tmp_path: Path) -> None:
    text = tmp_path / "no.jpg"
    text.write_bytes(b"no image")
    with (
        bentoml.SyncHTTPClient(server) as client,
        pytest.raises(BentoMLException, match="expected one of JPEG"),
    ):
        client.classify(image=text)
