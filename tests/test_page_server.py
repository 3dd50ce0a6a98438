"""The chat page in a browser, on the server itself."""

import pytest
from browsing import Visitor, browser, expect, visiting  # noqa: F401
from page_server import Script, on_a_port
from serving import adapter_for

from mlxlora.serve.engine import Engine, Options
from mlxlora.serve.http.app import application as real_application
from mlxlora.serve.http.guard import Rules
from mlxlora.serve.http.service import Service


class WithKey(Visitor):
    """One who is asked for the key first."""

    def open(self) -> None:
        self.page.goto(self.script.url)
        self.page.get_by_label("This server wants its API key.").fill("k3y")
        self.button("Use").click()
        expect(self.page.locator("#model-0")).not_to_have_value("")


@pytest.mark.slow
def test_the_server_and_the_page_understand_each_other(browser, dense):
    adapters = {"one": adapter_for(dense, 1), "two": adapter_for(dense, 2)}
    with (
        Engine(dense, adapters, Options(rows=4, waiting=4)) as engine,
        on_a_port(real_application(Service(engine, "lab/tiny"), Rules(key="k3y"))) as url,
        visiting(browser, Script(url=url), WithKey) as visitor,
    ):
        expect(visitor.page.get_by_label("Model", exact=True)).to_have_value("one")
        visitor.button("Settings").click()
        for name, value in {"Max tokens": "12", "Temperature": "0.8", "Seed": "1"}.items():
            visitor.page.get_by_label(name).fill(value)
        visitor.button("Done").click()
        visitor.say("hello")
        expect(visitor.answers).to_contain_text("12 tokens")
        expect(visitor.answers).to_contain_text("ended at the max tokens")
        first = visitor.answers.locator(".prose").last.inner_text()
        visitor.button("Regenerate").click()
        visitor.until_answered()
        assert visitor.answers.locator(".prose").last.inner_text() == first  # the same seed
        visitor.say("x" * 600)  # the tiny model reads 512 tokens
        expect(visitor.answers.last).to_contain_text("more than the model can read")
        visitor.compare(blind=True)
        visitor.button("Add a model").click()
        visitor.say("hello")
        expect(visitor.button("C is best")).to_be_visible()
