"""Photograph the page with the shipped bundles for README: `make screenshots` writes docs/screenshots/*.jpg."""

import io
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "screenshots"
WAIT = 60_000  # milliseconds


@contextmanager
def serving() -> Iterator[str]:
    """Serve the shipped bundles; yield the URL."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    settings = {"VITRINE_PORT": str(port), "VITRINE_GRPC_PORT": "0", "VITRINE_BUNDLES": str(ROOT / "bundles")}
    command = [sys.executable, "-m", "vitrine", "serve"]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **settings}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_until_ready(f"http://127.0.0.1:{port}/readyz")
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(timeout=60)


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"{url} does not answer")


def ask(page: Page, image: str, model: str) -> None:
    """Give the page an example, and wait for a model's answer."""
    page.set_input_files("#files", ROOT / "examples" / image)
    expect(page.locator(".summary")).not_to_be_empty(timeout=WAIT)
    page.locator(".model").select_option(model)
    expect(page.locator(".pane[aria-busy]")).to_have_count(0, timeout=WAIT)


def show_heat(page: Page, label: str, method: str) -> None:
    """Show where the network looks for the first answer with a label."""
    page.locator(".method").select_option(method)
    page.locator(".rows .row", has_text=label).first.click()
    expect(page.locator(".heat-note")).to_contain_text("the network ran", timeout=WAIT)
    page.mouse.move(0, 0)


def save(page: Page, name: str) -> None:
    """Write what is visible."""
    picture = Image.open(io.BytesIO(page.screenshot(animations="disabled"))).convert("RGB")
    picture.save(OUT / f"{name}.jpg", quality=88, subsampling=0, optimize=True)
    print(f"docs/screenshots/{name}.jpg")


def main() -> None:
    """Write the pictures."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    OUT.mkdir(exist_ok=True)
    with serving() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 760})
        page.goto(url, wait_until="networkidle")
        ask(page, "blood.jpg", "detr-bccd")
        show_heat(page, "WBC", "cross-attention")
        save(page, "detection")
        page.goto(url, wait_until="networkidle")
        ask(page, "cat.jpg", "vit-cifar10")
        show_heat(page, "cat", "attention-rollout")
        save(page, "classification")
        browser.close()


if __name__ == "__main__":
    main()
