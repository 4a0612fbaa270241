"""The page at /demo in a browser: by keyboard alone, in both colour schemes, wide and narrow, and with what the API refuses."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

WIDE, NARROW = (1280, 900), (390, 844)
TIMEOUT_MS = 60_000

# Of every visible element with a text of its own: the contrast of its colour to what is behind it (WCAG 2.2, 1.4.3).
CONTRASTS = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const parse = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, under) => top.slice(0, 3).map((value, i) => value * top[3] + under[i] * (1 - top[3]));
  const behind = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((under, layer) => over(layer, under), [255, 255, 255]);
  };
  const luminance = rgb => {
    const [r, g, b] = rgb.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = element.matches("textarea, input") ? element.value
      : [...element.childNodes].filter(n => n.nodeType === Node.TEXT_NODE).map(n => n.data).join("");
    if (!own.trim() || !element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    if (element.matches("script, style, option, input[type=radio], input[type=checkbox], input[type=range]")) continue;
    const box = element.getBoundingClientRect();
    if (box.width < 2 || box.height < 2) continue;
    const style = getComputedStyle(element), back = behind(element);
    const front = over(parse(element.namespaceURI.endsWith("svg") ? style.fill : style.color), back);
    const [low, high] = [luminance(front), luminance(back)].sort((a, b) => a - b);
    found.push([own.trim().slice(0, 40), (high + 0.05) / (low + 0.05)]);
  }
  return found;
}
"""


# Notes when the first token of the speculative answer is there.
WATCH = """
() => {
  window.asked = performance.now();
  window.first = null;
  const panel = document.querySelector("#speculative");
  const look = () => { if (panel.querySelector(".sd-text span")) window.first ??= performance.now(); };
  new MutationObserver(look).observe(panel, {childList: true, subtree: true});
}
"""


@dataclass
class Visit:
    """An open page, and what it complained of or asked elsewhere."""

    page: Page
    host: str
    complaints: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def hear(self) -> None:
        """Listens from now on."""
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._asked(request.url))

    def _said(self, told: ConsoleMessage) -> None:
        if told.type == "error":
            self.complaints.append(f"{told.text} {told.location['url']}")

    def _asked(self, url: str) -> None:
        if urlsplit(url).netloc != self.host and not url.startswith(("data:", "blob:")):
            self.foreign.append(url)

    def run(self) -> None:
        """Presses the keys that run the prompt, again while one that was stopped has not ended; waits for both answers."""
        for _ in range(TIMEOUT_MS // 5000):
            self.page.locator("#prompt textarea").press("Shift+Enter")
            with contextlib.suppress(AssertionError):
                return expect(self.page.locator("#verdict")).to_contain_text("tokens per second", timeout=5000)
        raise TimeoutError("no verdict")

    def tab_to(self, selector: str) -> None:
        """Moves the focus on, key by key, until it is there."""
        for _ in range(60):
            if self.page.evaluate("selector => document.activeElement?.matches(selector) ?? false", selector):
                return
            self.page.keyboard.press("Tab")
        raise AssertionError(f"{selector} cannot be reached with the Tab key")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # As root, or in a container, Chromium's own sandbox does not start; it sees nothing here but the page.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(request: pytest.FixtureRequest, browser: Browser, server_url: str) -> Iterator[Visit]:
    size, scheme = getattr(request, "param", (WIDE, "light"))
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    visit = Visit(context.new_page(), urlsplit(server_url).netloc)
    visit.hear()
    visit.page.goto(f"{server_url}/demo/")
    expect(visit.page.locator("#run")).to_be_visible(timeout=TIMEOUT_MS)
    yield visit
    context.close()
    assert visit.complaints == []
    assert visit.foreign == []


def schemes() -> list[object]:
    sizes: dict[str, tuple[int, int]] = {"wide": WIDE, "narrow": NARROW}
    colours: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    return [pytest.param((size, colour), id=f"{name}, {colour}") for name, size in sizes.items() for colour in colours]


@pytest.mark.parametrize("visit", schemes(), indirect=True)
def test_all_text_can_be_read(visit: Visit) -> None:
    visit.run()
    contrasts = visit.page.evaluate(CONTRASTS)
    assert len(contrasts) > 40
    assert [(text, round(ratio, 2)) for text, ratio in contrasts if ratio < 4.5] == []
    assert visit.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize(
    "visit", [pytest.param((WIDE, "light"), id="wide"), pytest.param((NARROW, "light"), id="narrow")], indirect=True
)
def test_a_reader_without_a_mouse_runs_an_example(visit: Visit) -> None:
    page = visit.page
    visit.tab_to("#examples button:nth-of-type(3)")
    page.keyboard.press("Enter")
    expect(page.locator("#prompt textarea")).to_have_value("Can I order a large latte with oat milk please?")
    expect(page.locator("#kind input:checked")).to_have_value("chat")
    visit.tab_to("#draft input")
    page.keyboard.press("ArrowDown")
    chosen = page.locator("#draft input:checked").input_value()
    visit.tab_to("#run")
    page.keyboard.press("Enter")
    expect(page.locator("#verdict")).to_contain_text("Identical", timeout=TIMEOUT_MS)
    assert page.locator("#plain .sd-text").inner_text() == page.locator("#speculative .sd-text").inner_text()
    assert page.locator("#speculative .accepted").count() > 0
    assert page.locator("#plain .accepted").count() == 0
    assert chosen in page.locator("#choice").inner_text()
    assert "drafted on average" in page.locator("#chart figcaption").inner_text()


def test_how_soon_something_is_seen(visit: Visit) -> None:
    """`pytest tests/serve/test_browser.py -k how_soon -s` says in how many milliseconds."""
    page = visit.page
    visit.run()  # the first answer warms the models up
    page.reload()
    expect(page.locator("#run")).to_be_visible(timeout=TIMEOUT_MS)
    painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    usable = page.evaluate("performance.now()")
    page.evaluate(WATCH)
    page.locator("#prompt textarea").press("Shift+Enter")
    page.wait_for_function("window.first !== null", timeout=TIMEOUT_MS)
    first = page.evaluate("window.first - window.asked")
    print(f"\nfirst paint {painted:.0f} ms, usable {usable:.0f} ms, first token {first:.0f} ms after the key")
    assert 0 < painted < usable


def test_a_run_that_is_stopped_leaves_the_page_as_it_was_before(visit: Visit) -> None:
    page = visit.page
    page.locator("#max-tokens input[type=number]").fill("512")
    page.locator("#run").click()
    expect(page.locator("#speculative .sd-text span").first).to_be_visible(timeout=TIMEOUT_MS)
    page.locator("#stop").click()
    page.locator("#max-tokens input[type=number]").fill("16")
    visit.run()
    expect(page.locator("#verdict")).to_contain_text("Identical")


def test_what_the_api_refuses_is_an_alert(visit: Visit) -> None:
    visit.page.locator("#prompt textarea").fill("word " * 3000)
    visit.page.locator("#run").click()
    alerts = visit.page.locator("[role=alert].sd-error")
    expect(alerts.first).to_contain_text("this model's maximum context length is 2048 tokens", timeout=TIMEOUT_MS)
    visit.page.locator("#prompt textarea").fill("def f(x):\n")
    visit.run()
    expect(alerts).to_have_count(0)
