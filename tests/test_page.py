"""The chat page in a browser: a conversation, and the keyboard."""

import re

import pytest
from browsing import browser, clipboard, expect, script, visitor  # noqa: F401
from page_server import Gate, Thought, model

from mlxlora.serve.http.app import PAGE

# What every run checks


def test_one_says_something_and_is_answered(visitor, script):
    visitor.say("hello there")
    expect(visitor.answers).to_contain_text("terse heard: hellothere")
    expect(visitor.answers).to_contain_text("3 tokens")
    assert script.asked == [
        {
            "model": "terse",
            "messages": [{"role": "user", "content": "hello there"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_the_page_is_whole_and_asks_nobody_else():
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"""(?:from |src=|href=)"(?:\./|/page/)([\w.]+)["]""", text):
            assert (PAGE / name).is_file(), f"{path.name} wants {name}"
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|\beval\b|srcdoc", text)
        addresses = set(re.findall(r"https?://[\w.-]+", text))
        assert addresses <= {"http://www.w3.org"}, path.name  # SVG's name


# A conversation


@pytest.mark.slow
def test_an_answer_is_shown_as_it_comes_and_folds_its_reasoning(visitor, script):
    gate, second = Gate(), Gate()
    script.answers["why"] = [Thought("It asks "), gate, Thought("why."), "Because", second, " so."]
    visitor.say("why", wait=False)
    reasoning = visitor.page.locator("details.reasoning")
    expect(reasoning).to_contain_text("Reasoning…")
    expect(visitor.answers).to_have_attribute("aria-busy", "true")
    gate.open()
    expect(visitor.answers).to_contain_text("Because")
    expect(visitor.answers).not_to_contain_text("so.")
    expect(visitor.page.get_by_text("It asks why.")).to_have_count(0)
    reasoning.locator("summary").click()
    expect(visitor.page.get_by_text("It asks why.")).to_be_visible()
    second.open()
    expect(visitor.answers).to_contain_text("Because so.")
    visitor.until_answered()
    expect(visitor.page.locator("#status")).to_have_text("The answer is complete")


@pytest.mark.slow
def test_a_conversation_is_told_whole_with_its_system_prompt_and_settings(visitor, script):
    visitor.button("Settings").click()
    visitor.page.get_by_label("System prompt").fill("Be brief.")
    visitor.page.get_by_label("Temperature").fill("0.5")
    visitor.page.get_by_label("Top p").fill("0.9")
    visitor.page.get_by_label("Max tokens").fill("99")
    visitor.page.get_by_label("Seed").fill("7")
    visitor.button("Done").click()
    visitor.say("one")
    visitor.say("two")
    first, second = script.asked
    assert (first["temperature"], first["top_p"], first["max_tokens"], first["seed"]) == (
        *(0.5, 0.9, 99, 7),
    )
    assert second["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "terse heard: one"},
        {"role": "user", "content": "two"},
    ]
    visitor.button("Settings").click()
    visitor.page.get_by_label("Temperature").fill("3")  # out of range: not taken
    expect(visitor.page.get_by_label("Temperature")).to_have_attribute("aria-invalid", "true")
    visitor.button("Done").click()
    visitor.say("three")
    assert "temperature" not in script.asked[2] and script.asked[2]["seed"] == 7
    visitor.button("Settings").click()
    visitor.button("Back to the server's defaults").click()
    visitor.button("Done").click()
    visitor.say("four")
    assert not {"temperature", "top_p", "max_tokens", "seed"} & set(script.asked[3])


@pytest.mark.slow
@pytest.mark.parametrize("by", ["button", "key"])
def test_an_answer_is_stopped_at_the_server_and_what_came_stays(visitor, script, by):
    gate = Gate()
    script.answers["count"] = ["one two", gate, " three"]
    visitor.say("count", wait=False)
    expect(visitor.answers).to_contain_text("one two")
    if by == "button":
        visitor.button("Stop").click()
    else:
        visitor.page.keyboard.press("Escape")
    visitor.until_answered()
    assert gate.left.wait(30)
    expect(visitor.answers).to_contain_text("one two")
    expect(visitor.answers).to_contain_text("stopped")
    visitor.say("and?")
    assert [m["role"] for m in script.asked[1]["messages"]] == ["user", "assistant", "user"]


@pytest.mark.slow
def test_an_answer_is_had_once_more(visitor, script):
    script.answers["draw"] = ["heads"]
    visitor.say("draw")
    script.answers["draw"] = ["tails"]
    visitor.button("Regenerate").click()
    expect(visitor.answers).to_contain_text("tails")
    expect(visitor.answers).to_have_count(1)
    assert script.asked[0] == script.asked[1]


@pytest.mark.slow
def test_an_earlier_message_is_edited_and_what_followed_is_gone(visitor, script):
    for text in ("first", "second", "third"):
        visitor.say(text)
    visitor.page.locator(".round").nth(1).get_by_role("button", name="Edit message").click()
    visitor.page.get_by_role("textbox", name="Edit message").fill("other")
    visitor.page.get_by_role("textbox", name="Edit message").press("Enter")
    visitor.until_answered()
    expect(visitor.page.locator(".bubble")).to_have_text(["first", "other"])
    assert [m["content"] for m in script.asked[-1]["messages"]] == [
        *("first", "terse heard: first", "other"),
    ]


@pytest.mark.slow
def test_editing_stops_the_answer_in_the_making(visitor, script):
    gate = Gate()
    script.answers["long"] = ["begun", gate]
    visitor.say("long", wait=False)
    expect(visitor.answers).to_contain_text("begun")
    visitor.field.press("ArrowUp")
    visitor.page.get_by_role("textbox", name="Edit message").fill("short")
    visitor.page.get_by_role("textbox", name="Edit message").press("Enter")
    assert gate.left.wait(30)
    expect(visitor.answers).to_contain_text("terse heard: short")
    visitor.until_answered()
    expect(visitor.answers).to_have_count(1)


@pytest.mark.slow
def test_messages_and_code_are_copied_as_they_were_written(visitor, script):
    text = "Look:\n\n```python\nif a < b:\n    print('\u202ehi')\n```\n\n*done*"
    script.answers["code"] = [text]
    visitor.say("code")
    visitor.button("Copy code").click()
    expect(visitor.page.locator("#status")).to_have_text("Copied")
    assert clipboard(visitor) == "if a < b:\n    print('\u202ehi')"
    visitor.button("Copy answer").click()
    expect(visitor.answers.locator("footer path[d^='M5 12.5']")).to_be_visible()
    assert clipboard(visitor) == text
    visitor.page.locator(".prompt").hover()
    visitor.button("Copy message").click()
    expect(visitor.page.locator(".prompt path[d^='M5 12.5']")).to_be_visible()
    assert clipboard(visitor) == "code"


@pytest.mark.slow
def test_a_model_that_cannot_chat_continues_plain_text(visitor, script):
    script.models.append(model("scribe", capabilities=()))
    visitor.open()
    visitor.page.get_by_label("Model", exact=True).select_option("scribe")
    expect(visitor.page.locator("#plain")).to_contain_text("scribe cannot chat")
    script.answers["Once "] = ["upon *a* time"]
    visitor.say("Once ")
    visitor.say(", there")
    assert script.paths == ["/v1/completions"] * 2
    assert script.asked[1]["prompt"] == "Once upon *a* time, there"
    expect(visitor.answers.first).to_contain_text("upon *a* time")
    assert visitor.saved("Export JSONL") == [
        {"text": "Once upon *a* time, there" + "scribe heard: Onceupon*a*time,there"}
    ]


# The keyboard


@pytest.mark.slow
def test_all_is_done_by_keys(visitor, script):
    expect(visitor.field).to_be_focused()
    visitor.page.keyboard.type("one")
    visitor.page.keyboard.press("Shift+Enter")
    visitor.page.keyboard.type("two")
    visitor.page.keyboard.press("Enter")
    visitor.until_answered()
    assert script.asked[0]["messages"][-1]["content"] == "one\ntwo"
    visitor.page.keyboard.press("ArrowUp")
    editing = visitor.page.get_by_role("textbox", name="Edit message")
    expect(editing).to_be_focused()
    expect(editing).to_have_value("one\ntwo")
    visitor.page.keyboard.press("Escape")
    expect(editing).to_have_count(0)
    visitor.page.keyboard.press("/")
    expect(visitor.field).to_be_focused()
    expect(visitor.field).to_have_value("")
    visitor.page.keyboard.type("1/2")
    expect(visitor.field).to_have_value("1/2")
    visitor.page.keyboard.press("Control+k")
    expect(visitor.answers).to_have_count(0)
    expect(visitor.field).to_be_focused()


@pytest.mark.slow
def test_enter_ends_a_word_of_an_input_method_and_sends_nothing(visitor, script):
    visitor.field.fill("nihao")
    visitor.field.evaluate(
        "field => field.dispatchEvent("
        "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    expect(visitor.field).to_have_value("nihao")
    assert script.asked == []


@pytest.mark.slow
def test_every_control_has_a_name_and_every_focus_is_seen(visitor):
    visitor.say("hello")
    nameless = visitor.page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea")]
          .filter((one) => one.checkVisibility())
          .filter((one) => !(one.ariaLabel || one.labels?.length || one.textContent.trim()))
          .map((one) => one.id || one.className)"""
    )
    assert nameless == []
    for _ in range(12):
        visitor.page.keyboard.press("Tab")
        seen = visitor.page.evaluate(
            """() => {
              const one = document.activeElement;
              if (one === document.body) return true; // past the last
              const styles = [one, one.parentElement].map((each) => getComputedStyle(each));
              return styles.some((s) => s.outlineStyle !== "none" || s.boxShadow !== "none");
            }"""
        )
        assert seen, visitor.page.evaluate("document.activeElement.id")
