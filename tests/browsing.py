"""A browser on the chat page, and who uses it; every visit is watched for harm."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from page_server import Script, serving

CHROMIUM = Path("/usr/bin/chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if not CHROMIUM.exists():
    pytest.skip("there is no /usr/bin/chromium", allow_module_level=True)
expect = playwright.expect
expect.set_options(timeout=60_000)  # milliseconds: at most, on a machine with much else to do

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
WATCH = """
window.violations = [];
addEventListener("securitypolicyviolation", (event) =>
  window.violations.push(`${event.violatedDirective} ${event.blockedURI} ${event.sample}`));
"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as program:
        launched = program.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()
    with serving(script):
        yield script


@dataclass
class Seen:
    """What a page should not have done."""

    dialogs: list[str] = field(default_factory=list)
    abroad: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    popups: list[str] = field(default_factory=list)


@dataclass
class Visitor:
    """Who uses the page, and finds things as one who cannot see it would."""

    page: object
    script: Script
    seen: Seen = field(default_factory=Seen)

    @property
    def field(self):
        return self.page.get_by_role("textbox", name="Message", exact=True)

    def button(self, name: str):
        return self.page.get_by_role("button", name=name, exact=True)

    @property
    def answers(self):
        return self.page.locator("article.answer")

    def say(self, text: str, *, wait: bool = True) -> None:
        self.field.fill(text)
        self.field.press("Enter")
        if wait:
            self.until_answered()

    def until_answered(self) -> None:
        expect(self.page.locator("#send")).to_have_attribute("aria-label", "Send")
        expect(self.page.locator("[aria-busy]")).to_have_count(0)

    def open(self) -> None:
        self.page.goto(self.script.url)
        expect(self.page.locator("#model-0")).not_to_have_value("")

    def compare(self, *, blind: bool = False) -> None:
        self.button("Compare models").click()
        expect(self.page.get_by_label("Model 1")).to_be_visible()
        self.page.get_by_label("Blind").set_checked(blind)

    def saved(self, button: str) -> list[dict]:
        with self.page.expect_download() as download:
            self.button(button).click()
        text = Path(download.value.path()).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


@contextmanager
def visiting(browser, script: Script, kind: type[Visitor] = Visitor) -> Iterator[Visitor]:
    """Whatever is done, the page must have stayed harmless."""
    context = browser.new_context(reduced_motion="reduce")
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    context.add_init_script(WATCH)
    page = context.new_page()
    visitor = kind(page, script)
    seen = visitor.seen
    page.on("dialog", lambda dialog: (seen.dialogs.append(dialog.message), dialog.dismiss()))
    page.on("popup", lambda popup: seen.popups.append(popup.url))
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("request", lambda request: seen.abroad.append(request.url))
    visitor.open()
    yield visitor
    violations = page.evaluate("window.violations")
    context.close()
    abroad = [url for url in seen.abroad if not url.startswith((script.url, "blob:", "data:"))]
    assert (seen.dialogs, abroad, seen.errors, seen.popups, violations) == ([], [], [], [], [])


@pytest.fixture
def visitor(browser, script) -> Iterator[Visitor]:
    with visiting(browser, script) as visitor:
        yield visitor


def clipboard(visitor: Visitor) -> str:
    return visitor.page.evaluate("navigator.clipboard.readText()")
