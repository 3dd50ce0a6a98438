"""The page of a run in a browser."""

import pytest
from browsing import browser  # noqa: F401  (a fixture)
from test_report import run_path  # noqa: F401  (a fixture)

from mlxlora.report.write import write_report


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_without_a_request_or_a_complaint(browser, run_path, scheme):
    told: list[str] = []
    shown = browser.new_page(color_scheme=scheme, viewport={"width": 400, "height": 800})
    shown.on("request", lambda request: told.append(request.url))
    shown.on("console", lambda message: told.append(message.text))
    written = write_report(run_path).path
    shown.goto(f"file://{written}")
    assert [text for text in told if not text.startswith(("data:", f"file://{written}"))] == []
    assert shown.evaluate("document.documentElement.scrollWidth") <= 400
    assert shown.locator("figure svg").count() == 5
    shown.close()
