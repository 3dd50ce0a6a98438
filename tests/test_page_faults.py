"""The chat page in a browser: keys, refusals and answers that break off."""

import pytest
from browsing import browser, expect, script, visitor  # noqa: F401
from page_server import Breakdown, Cut, Refusal


@pytest.mark.slow
def test_a_key_is_asked_for_and_kept_for_the_session_only(visitor, script):
    visitor.say("before")
    script.key = "s3cret"
    visitor.say("after")
    field = visitor.page.get_by_label("This server wants its API key.")
    expect(field).to_be_focused()
    field.fill("wrong")
    field.press("Enter")
    expect(visitor.page.get_by_text("The server does not take this key.")).to_be_visible()
    visitor.page.locator("#key-field").fill("s3cret")
    visitor.page.locator("#key-field").press("Enter")
    expect(visitor.answers.nth(1)).to_contain_text("terse heard: after")  # asked again by itself
    expect(visitor.page.locator("#key")).to_be_hidden()
    assert "s3cret" not in visitor.page.evaluate("JSON.stringify(localStorage)")
    visitor.page.reload()
    visitor.say("still")
    expect(visitor.answers.nth(2)).to_contain_text("terse heard: still")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        (Refusal(429, "full", None, (("Retry-After", "7"),)), "It asks to wait 7 seconds."),
        (Refusal(429, "full"), "too much to do"),
        (Refusal(400, "9,000 of 8,192", "context_length_exceeded"), "more than the model can read"),
        (Refusal(400, "temperature: too hot"), "temperature: too hot"),
        (Refusal(404, "no model 'terse'"), "no model 'terse'"),
        (Refusal(503, "loading"), "loading"),
    ],
)
def test_a_refusal_is_said_in_words(visitor, script, refusal, said):
    script.answers["hello"] = [refusal]
    visitor.say("hello")
    expect(visitor.page.get_by_role("alert").filter(has_text=said)).to_be_visible()
    if refusal.code is None:
        del script.answers["hello"]
        visitor.button("Try again").click()
        expect(visitor.answers).to_contain_text("terse heard: hello")
        expect(visitor.page.locator(".failure")).to_be_hidden()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"), [(Breakdown("out of memory"), "out of memory"), (Cut(), "connection")]
)
def test_a_fault_in_mid_stream_is_shown_and_the_partial_answer_stays(visitor, script, fault, said):
    script.answers["go"] = ["so ", "far", fault]
    visitor.say("go")
    expect(visitor.answers).to_contain_text("so far")
    expect(visitor.page.get_by_role("alert").filter(has_text=said)).to_be_visible()
    visitor.page.reload()
    expect(visitor.answers).to_contain_text("so far")
    expect(visitor.answers).to_contain_text(said)
    visitor.say("on")  # the partial answer is part of what was said
    assert script.asked[-1]["messages"][1] == {"role": "assistant", "content": "so far"}


@pytest.mark.slow
def test_a_server_that_is_gone_is_tried_again(visitor, script, browser):
    visitor.page.route("**/v1/**", lambda route: route.abort())
    visitor.say("hello")
    expect(visitor.page.get_by_text("The server does not answer.")).to_be_visible()
    visitor.page.reload()
    notice = visitor.page.locator("#notice")
    expect(notice).to_contain_text("The server does not answer.")
    visitor.page.unroute("**/v1/**")
    notice.get_by_role("button", name="Try again").click()
    expect(notice).to_be_hidden()
    visitor.page.locator(".answer").get_by_role("button", name="Try again").click()
    expect(visitor.answers).to_contain_text("terse heard: hello")
