"""Photograph the page with the shipped bundles for README: `make screenshots` writes docs/screenshots/*.jpg."""

import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from benchmarks.soak.server import started

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "screenshots"
WAIT = 60_000  # milliseconds


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
    with started(VITRINE_BUNDLES=str(ROOT / "bundles")) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 760})
        page.goto(server.url, wait_until="networkidle")
        ask(page, "blood.jpg", "detr-bccd")
        show_heat(page, "WBC", "cross-attention")
        save(page, "detection")
        page.goto(server.url, wait_until="networkidle")
        ask(page, "cat.jpg", "vit-cifar10")
        show_heat(page, "cat", "attention-rollout")
        save(page, "classification")
        browser.close()


if __name__ == "__main__":
    main()
