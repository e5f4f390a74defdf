"""The page at `/`: how it is served, and what a visitor does with it, in a real browser."""

import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

from vitrine.service.http.page import page_files

Serving = Callable[..., AbstractContextManager[Any]]
Visit = Callable[..., AbstractContextManager[Page]]
KEY = "a-key-of-the-tests-1"
MOST_BYTES = 80_000
WAIT = 30_000  # milliseconds

DROP = """async ([files, type]) => {
    const data = new DataTransfer();
    for (const [name, bytes] of files) data.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
    const init = {bubbles: true, cancelable: true};
    const event = type === "paste" ? new ClipboardEvent(type, {...init, clipboardData: data})
                                   : new DragEvent(type, {...init, dataTransfer: data});
    document.body.dispatchEvent(event);
}"""


# How it is served.


def test_the_files_are_few_bytes_and_need_each_other() -> None:
    files = page_files()
    assert sum(len(file.body) for file in files.values()) < MOST_BYTES
    text = {name: file.body.decode() for name, file in files.items()}
    loaded = set(re.findall(r'(?:src|href)="page/([\w.]+)"', text["index.html"]))
    imported = {name for source in text.values() for name in re.findall(r'from "\./([\w.]+)"', source)}
    assert loaded == files.keys() - {"index.html"}
    assert imported <= loaded  # each module is fetched at once, not when the one before it has been read
    foreign = {url for source in text.values() for url in re.findall(r"https?://[\w./-]+", source)}
    assert foreign == {"http://www.w3.org/2000/svg"}  # a name, which is not fetched


def test_a_file_that_the_client_has_is_not_sent_again(server: str) -> None:
    for path, media_type in (("/", "text/html"), ("/page/app.js", "text/javascript"), ("/page/icon.svg", "image/svg")):
        first = httpx.get(server + path)
        assert first.status_code == 200
        assert first.headers["content-type"].startswith(media_type)
        for tag in (first.headers["etag"], f'"other", W/{first.headers["etag"]}', "*"):
            again = httpx.get(server + path, headers={"If-None-Match": tag})
            assert (again.status_code, again.content) == (304, b"")
            assert again.headers["etag"] == first.headers["etag"]
        assert httpx.get(server + path, headers={"If-None-Match": '"other"'}).content == first.content
        assert httpx.head(server + path).headers["content-length"] == str(len(first.content))


def test_nothing_inline_and_nothing_foreign_may_run(server: str) -> None:
    policy = httpx.get(f"{server}/").headers["content-security-policy"]
    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    assert directives["default-src"] == directives["frame-ancestors"] == directives["base-uri"] == "'none'"
    assert directives["script-src"] == directives["style-src"] == directives["connect-src"] == "'self'"
    assert "unsafe" not in policy


@pytest.mark.parametrize("name", ["nothing.js", "..%2fpage.py", "%2e%2e", "index.html%00"])
def test_there_are_no_other_files(name: str, server: str) -> None:
    answer = httpx.get(f"{server}/page/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_it_can_be_switched_off(serve: Serving, tiny_bundles: Path) -> None:
    with serve(tiny_bundles, VITRINE_PAGE="false") as (url, *_):
        statuses = [httpx.get(url + path).status_code for path in ("/", "/page/app.js", "/docs", "/models")]
    assert statuses == [404, 404, 200, 200]


# What a visitor does.


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"],
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser) -> Visit:
    """Open the page; in the end nothing may have been printed, or asked of another origin."""

    @contextmanager
    def open_page(url: str, *, expected: str = "nothing", **options: Any) -> Iterator[Page]:
        said: list[str] = []
        asked: list[str] = []
        context = browser.new_context(**options)
        context.set_default_timeout(WAIT)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{url}/")
        expect(page.locator("#samples img").first).to_be_visible(timeout=WAIT)
        yield page
        context.close()
        assert [text for text in said if expected not in text] == []
        assert [other for other in asked if not other.startswith((f"{url}/", f"blob:{url}/"))] == []

    return open_page


@pytest.fixture
def page(visit: Visit, server: str) -> Iterator[Page]:
    with visit(server) as page:
        yield page


def give(page: Page, *files: bytes, by: str = "drop") -> None:
    """Give the page images, and wait for the answer to the first of them."""
    page.evaluate(DROP, [[[f"photograph {i}.png", list(data)] for i, data in enumerate(files)], by])
    expect(page.locator(".summary").first).not_to_be_empty(timeout=WAIT)
    expect(page.locator(".pane[aria-busy]")).to_have_count(0, timeout=WAIT)


def choose(page: Page, model: str) -> None:
    page.locator(".model").select_option(model)
    expect(page.locator(".pane[aria-busy]")).to_have_count(0, timeout=WAIT)


def set_range(page: Page, selector: str, value: float) -> None:
    page.locator(selector).first.evaluate(
        "(range, value) => { range.value = value; range.dispatchEvent(new Event('input', {bubbles: true})); }", value
    )


def scores(url: str, image: bytes, threshold: float) -> list[float]:
    answer = httpx.post(f"{url}/detect?threshold={threshold}", content=image).json()
    return [entry["score"] for entry in answer["detections"]]


@pytest.fixture(scope="module")
def square(squares: Path) -> bytes:
    return (squares / "images" / "test0.png").read_bytes()


@pytest.mark.parametrize("by", ["drop", "paste"])
def test_an_image_that_is_dropped_or_pasted_is_answered_at_once(
    by: str, page: Page, server: str, square: bytes
) -> None:
    give(page, square, by=by)
    set_range(page, ".threshold-slider", 0.05)
    expected = scores(server, square, 0.05)
    assert expected, "the tiny detector finds nothing: the test needs another image"
    rows = page.locator(".rows .row .value").all_inner_texts()
    assert rows == [f"{100 * score:.1f} %" for score in expected]
    assert page.locator("rect.box").count() == len(expected)
    assert page.locator(".photograph").evaluate("image => image.naturalWidth") == 80


def test_boxes_lie_where_the_answer_says(page: Page, server: str, square: bytes) -> None:
    give(page, square)
    set_range(page, ".threshold-slider", 0.05)
    answer = httpx.post(f"{server}/detect?threshold=0.05", content=square).json()
    stage = page.locator(".stage").bounding_box()
    assert stage is not None
    scale = stage["width"] / answer["image"]["width"]
    for index, entry in enumerate(answer["detections"]):
        box = page.locator(f"rect.box[data-index='{index}']").bounding_box()
        assert box is not None
        found = [(box["x"] - stage["x"]) / scale, (box["y"] - stage["y"]) / scale, box["width"] / scale]
        width = entry["box"]["x_max"] - entry["box"]["x_min"]
        stroke = 4 / scale
        assert found == pytest.approx([entry["box"]["x_min"], entry["box"]["y_min"], width], abs=stroke)


def test_the_threshold_filters_without_a_request_and_stays(page: Page, server: str, square: bytes) -> None:
    give(page, square, square)
    expect(page.locator(".threshold-slider").first).to_have_value("0.5")
    asked: list[Request] = []
    page.on("request", lambda request: asked.append(request))
    for threshold in (0.05, 0.2, 0.9):
        set_range(page, ".threshold-slider", threshold)
        assert page.locator(".rows .row").count() == len(scores(server, square, threshold))
        assert page.locator("rect.box").count() == len(scores(server, square, threshold))
    assert not [request for request in asked if "blob:" not in request.url]
    page.get_by_role("button", name="Next image").click()
    expect(page.locator("#thumbnails [aria-current]")).to_have_attribute("aria-label", "2: photograph 1.png")
    assert page.locator(".threshold-slider").input_value() == "0.9"


def test_a_row_and_its_box_stand_out_together(page: Page, square: bytes) -> None:
    give(page, square)
    set_range(page, ".threshold-slider", 0.05)
    row, box = page.locator(".rows .row").first, page.locator("rect.box[data-index='0']")
    row.hover()
    expect(box).to_have_class(re.compile("highlit"))
    page.mouse.move(0, 0)
    expect(box).not_to_have_class(re.compile("highlit"))
    box.dispatch_event("pointerenter")
    expect(row).to_have_class(re.compile("highlit"))
    box.dispatch_event("pointerleave")
    expect(row).not_to_have_class(re.compile("highlit"))
    row.focus()
    expect(box).to_have_class(re.compile("highlit"))


def test_a_box_shows_its_heat_and_a_place_what_the_encoder_sees(page: Page, square: bytes) -> None:
    give(page, square)
    set_range(page, ".threshold-slider", 0.05)
    row = page.locator(".rows .row").first
    row.click()
    expect(page.locator(".heat canvas")).to_have_count(1, timeout=WAIT)
    expect(row).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".heat-note")).to_contain_text("cross-attention: the network ran once")
    page.keyboard.press("Escape")
    expect(page.locator(".heat canvas")).to_have_count(0)
    page.get_by_role("button", name="Look from a point").click()
    expect(page.locator(".heat-note")).to_contain_text("encoder attention: the network ran once", timeout=WAIT)
    point = page.locator(".point")
    expect(point).to_be_focused()
    before = point.get_attribute("aria-label")
    page.keyboard.press("ArrowLeft")
    expect(point).not_to_have_attribute("aria-label", before or "")
    stage = page.locator(".stage").bounding_box()
    assert stage is not None
    set_range(page, ".threshold-slider", 1)  # no boxes: every place is free
    page.mouse.click(stage["x"] + stage["width"] / 4, stage["y"] + stage["height"] / 2)
    expect(point).to_have_attribute("aria-label", re.compile("Point at (19|20), (35|36)"))


def test_a_label_shows_its_heat_and_a_slider_each_layer(page: Page, server: str, photograph: bytes) -> None:
    give(page, photograph)
    choose(page, "colours")
    answer = httpx.post(f"{server}/classify?model=colours", content=photograph).json()["predictions"]
    assert page.locator(".rows .label").all_inner_texts() == [entry["label"] for entry in answer]
    page.locator(".rows .row").first.click()
    expect(page.locator(".heat-note")).to_contain_text("attention rollout", timeout=WAIT)
    page.locator(".method").select_option("occlusion")
    expect(page.locator(".heat-note")).to_contain_text("occlusion: the network ran", timeout=WAIT)
    expect(page.locator(".layer-value")).to_have_text("Block 2 of 2: the answer")
    set_range(page, ".layer-slider", 1)
    explained = httpx.post(f"{server}/explain?model=colours&layers=true", content=photograph).json()
    first = explained["explanations"][0]["layers"][0]
    expect(page.locator(".layer-value")).to_have_text("Block 1 of 2")
    expect(page.locator(".layer-rows .label").first).to_have_text(first[0]["label"], timeout=WAIT)
    assert page.locator(".layer-rows .value").first.inner_text() == f"{100 * first[0]['probability']:.1f} %"


def test_two_variants_are_compared(page: Page) -> None:
    pixels = np.random.default_rng(1).normal(110, 40, (16, 20, 3)).clip(0, 255)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    give(page, buffer.getvalue())
    choose(page, "colours")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator(".pane")).to_have_count(2)
    second = page.locator(".pane").nth(1)
    expect(second.locator(".rows .row")).to_have_count(3, timeout=WAIT)
    assert second.locator(".variant").input_value() == "fp16-weights"
    second.locator(".variant").select_option("int8-dynamic")
    expect(page.locator(".pane[aria-busy]")).to_have_count(0, timeout=WAIT)
    shares = [
        [float(text.split()[0]) for text in pane.locator(".rows .value").all_inner_texts()]
        for pane in (page.locator(".pane").first, second)
    ]
    marks = second.locator(".mark").all_inner_texts()
    assert marks, "int8 answers as fp32 does: the test needs another image"
    assert float(marks[0].replace("−", "-")) == pytest.approx(shares[1][0] - shares[0][0], abs=0.11)
    page.get_by_role("button", name="Compare").click()
    expect(page.locator(".pane")).to_have_count(1)


def test_the_program_and_the_json_are_those_of_the_answer(page: Page, server: str, square: bytes) -> None:
    give(page, square)
    set_range(page, ".threshold-slider", 0.3)
    page.locator("details.code summary").click()
    program = page.locator(".program")
    expect(program).to_contain_text("-F threshold=0.3")
    expect(program).to_contain_text("-F 'image=@photograph 0.png'")
    expect(program).to_contain_text(f"{server}/detect")
    for language, word in (("Python", "requests.post("), ("JavaScript", "new FormData()")):
        page.get_by_role("button", name=language).click()
        expect(program).to_contain_text(word)
    page.locator("details.json summary").click()
    shown = json.loads(page.locator(".document").inner_text())
    assert shown == httpx.post(f"{server}/detect?threshold=0.3", content=square).json()
    for name, suffix in (("Download picture", ".png"), ("Download", ".json")):
        with page.expect_download() as download:
            page.get_by_role("button", name=name, exact=True).click()
        assert download.value.suggested_filename.startswith("photograph 0")
        assert download.value.suggested_filename.endswith(suffix)


def test_a_sample_and_the_camera_need_one_click(page: Page) -> None:
    page.get_by_role("button", name="Sample 1 of squares").click()
    expect(page.locator(".summary")).not_to_be_empty(timeout=WAIT)
    page.get_by_role("button", name="Camera").click()
    expect(page.locator("video")).not_to_have_js_property("videoWidth", 0, timeout=WAIT)
    page.get_by_role("button", name="Take picture").click()
    expect(page.locator("#thumbnails [aria-current]")).to_have_attribute("aria-label", "2: camera.jpg", timeout=WAIT)


def test_errors_are_the_services_sentences(visit: Visit, server: str, square: bytes) -> None:
    with visit(server, expected="415") as page:  # Chromium itself notes the status
        page.evaluate(DROP, [[["notes.png", list(b"not an image")]], "drop"])
        message = httpx.post(f"{server}/detect", content=b"not an image").json()["error"]["message"]
        expect(page.locator(".error")).to_have_text(message, timeout=WAIT)
        expect(page.locator(".rows .row")).to_have_count(0)
        give(page, square)
        expect(page.locator(".error")).to_be_hidden()
        page.evaluate(DROP, [[], "drop"])
        expect(page.locator("#notice")).to_contain_text("no image")


def test_a_key_is_asked_for_and_kept_in_the_session(
    serve: Serving, tiny_bundles: Path, browser: Browser, square: bytes
) -> None:
    with serve(tiny_bundles, VITRINE_API_KEYS=KEY) as (url, *_):
        context = browser.new_context()
        context.set_default_timeout(WAIT)
        page = context.new_page()
        page.goto(f"{url}/")
        for key in ("wrong", KEY):
            page.locator("#key-input").fill(key)
            page.get_by_role("button", name="Use it").click()
            if key == "wrong":
                expect(page.locator("#key-error")).to_contain_text("unknown", timeout=WAIT)
        expect(page.locator("#samples img").first).to_be_visible(timeout=WAIT)
        give(page, square)
        assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        page.reload()
        expect(page.locator("#samples img").first).to_be_visible(timeout=WAIT)
        context.close()


def test_it_works_by_keyboard_alone(page: Page, square: bytes) -> None:
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Choose")).to_be_focused()
    page.get_by_role("button", name="Sample 1 of squares").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".summary")).not_to_be_empty(timeout=WAIT)
    give(page, square)
    page.locator("#choose").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#thumbnails [aria-current]")).to_have_attribute("aria-label", re.compile("^1: "))
    page.keyboard.press("ArrowRight")
    expect(page.locator("#thumbnails [aria-current]")).to_have_attribute("aria-label", re.compile("^2: "))
    set_range(page, ".threshold-slider", 0.05)
    page.locator(".rows .row").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator(".heat canvas")).to_have_count(1, timeout=WAIT)
    expect(page.locator("#status")).to_contain_text("object", timeout=WAIT)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("light", {}),
        ("dark", {"color_scheme": "dark"}),
        ("phone", {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}),
    ],
)
def test_it_is_accessible(
    name: str, options: dict[str, Any], visit: Visit, server: str, root: Path, square: bytes
) -> None:
    axe = root / "tests" / "node" / "node_modules" / "axe-core" / "axe.min.js"
    assert axe.exists(), "axe-core is missing: run the tests by `make test`"

    def check(page: Page) -> None:
        # The policy forbids foreign scripts; this one comes over the debugging protocol.
        found = page.evaluate(f"(async () => {{ {axe.read_text()}; return (await axe.run()).violations; }})()")
        assert [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found] == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the window"

    with visit(server, **options) as page:
        check(page)
        give(page, square, square)
        set_range(page, ".threshold-slider", 0.05)
        for part in ("time", "facts", "code", "json"):
            page.locator(f"details.{part} summary").click()
            check(page)
        page.locator(".rows .row").first.click()
        expect(page.locator(".heat canvas")).to_have_count(1, timeout=WAIT)
        check(page)
        choose(page, "colours")
        expect(page.locator(".layers")).to_be_visible()
        page.get_by_role("button", name="Compare").click()
        expect(page.locator(".pane")).to_have_count(2)
        expect(page.locator(".pane[aria-busy]")).to_have_count(0, timeout=WAIT)
        check(page)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(17, 20, 22)" if name == "dark" else "rgb(247, 247, 244)"
        )
