"""The chat page in a real browser, against a scripted server, under its strict policy."""

import json
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from page_server import (
    BASE,
    Breakdown,
    Cut,
    Gate,
    Refusal,
    Script,
    Thought,
    model,
    on_a_port,
    serving,
)
from serving import adapter_for

from mlxlora.data.formats import parse
from mlxlora.serve.engine import Engine, Options
from mlxlora.serve.http.app import PAGE
from mlxlora.serve.http.app import application as real_application
from mlxlora.serve.http.guard import Rules
from mlxlora.serve.http.service import Service

CHROMIUM = Path("/usr/bin/chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if not CHROMIUM.exists():
    pytest.skip("there is no /usr/bin/chromium", allow_module_level=True)
expect = playwright.expect

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
        expect(self.button("Send")).to_be_visible()
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


# What is kept


@pytest.mark.slow
def test_conversations_outlive_a_reload(visitor, script):
    visitor.say("keep this")
    visitor.page.reload()
    expect(visitor.answers).to_contain_text("terse heard: keepthis")
    visitor.say("and this")
    assert len(script.asked[-1]["messages"]) == 3
    visitor.button("New conversation").click()
    visitor.say("another")
    titles = visitor.page.locator("#conversations .title")
    expect(titles).to_have_text(["another", "keep this"])
    titles.nth(1).click()
    expect(visitor.page.locator(".bubble")).to_have_text(["keep this", "and this"])


@pytest.mark.slow
def test_a_partial_answer_outlives_a_reload(visitor, script):
    script.answers["slow"] = ["half of", Gate()]
    visitor.say("slow", wait=False)
    expect(visitor.answers).to_contain_text("half of")
    visitor.page.reload()
    expect(visitor.answers).to_contain_text("half of")
    expect(visitor.answers).to_contain_text("stopped")


@pytest.mark.slow
def test_another_conversation_can_be_read_while_one_is_answered(visitor, script):
    gate = Gate()
    visitor.say("quick")
    visitor.button("New conversation").click()
    script.answers["slow"] = ["half", gate, " whole"]
    visitor.say("slow", wait=False)
    expect(visitor.answers).to_contain_text("half")
    visitor.page.locator("#conversations").get_by_text("quick").click()
    expect(visitor.button("Send")).to_be_visible()
    visitor.page.locator("#conversations").get_by_text("slow").click()
    expect(visitor.button("Stop")).to_be_visible()
    gate.open()
    expect(visitor.answers).to_contain_text("half whole")


@pytest.mark.slow
def test_conversations_are_renamed_deleted_had_back_and_exported(visitor):
    visitor.say("first")
    visitor.say("second")
    visitor.button("New conversation").click()
    visitor.say("third")
    visitor.page.locator(".item").nth(1).hover()
    visitor.button("Rename first").click()
    visitor.page.get_by_label("Title").fill("Counting")
    visitor.page.get_by_label("Title").press("Enter")
    titles = visitor.page.locator("#conversations .title")
    expect(titles).to_have_text(["third", "Counting"])
    rows = visitor.saved("Export JSONL")
    assert [[m["content"] for m in row["messages"]] for row in rows] == [
        ["third", "terse heard: third"],
        ["first", "terse heard: first", "second", "terse heard: second"],
    ]
    assert all(parse(row, {}).kind == "chat" for row in rows)  # training reads them
    visitor.page.locator(".item").nth(0).hover()
    visitor.button("Delete third").click()
    expect(titles).to_have_text(["Counting"])
    expect(visitor.answers).to_have_count(0)
    visitor.button("Undo").click()
    expect(titles).to_have_text(["third", "Counting"])
    visitor.button("Delete all").click()
    visitor.page.get_by_role("dialog").get_by_role("button", name="Delete all").click()
    expect(titles).to_have_count(0)
    visitor.page.reload()
    expect(visitor.page.get_by_text("Conversations stay in this browser.")).to_be_visible()


STORE = """async (most) => {
  const { Store } = await import("/page/store.js");
  const { newConversation, newAnswer } = await import("/page/conversation.js");
  localStorage.clear();
  const store = new Store(localStorage, most);
  const said = [];
  for (let n = 0; n < 6; n++) {
    const conversation = newConversation({ models: ["a"] });
    Object.assign(conversation, { id: `c${n}`, updated: n });
    const answer = { ...newAnswer("a", false), content: "x".repeat(n === 5 ? most : 1000) };
    conversation.rounds.push({ prompt: "p", answers: [answer], vote: null });
    said.push(store.save(conversation));
  }
  localStorage.setItem("mlxlora.conversation.damaged", '{"id": 3');
  localStorage.setItem("mlxlora.conversation.other", '{"id": "other", "rounds": [{}]}');
  const again = new Store(localStorage, most);
  return [said, again.list().map(({ id }) => id), again.load("damaged"), again.load("other")];
}"""


@pytest.mark.slow
def test_what_is_kept_is_bounded_the_oldest_go_and_damage_is_passed_over(visitor):
    said, ids, damaged, other = visitor.page.evaluate(STORE, 4000)
    kept = [[True, 0], [True, 0], [True, 0], [True, 1], [True, 1], [False, 0]]
    assert said == kept
    assert ids == ["c4", "c3", "c2"]
    assert damaged is None and other is None


# Comparisons


@pytest.mark.slow
def test_models_are_compared_side_by_side_each_with_its_own_history(visitor, script):
    gates = Gate(), Gate()
    script.answers["terse", "go"] = ["terse says", gates[0]]
    script.answers["Qwen3-0.6B-4bit", "go"] = ["base says", gates[1]]
    visitor.compare()
    visitor.say("go", wait=False)
    expect(visitor.answers).to_contain_text(["terse says", "base says"])  # both at once
    for gate in gates:
        gate.open()
    visitor.until_answered()
    visitor.say("on")
    told = {body["model"]: body["messages"][1]["content"] for body in script.asked[2:]}
    assert told == {"terse": "terse says", BASE: "base says"}
    left, right = (visitor.answers.nth(n).bounding_box() for n in (0, 1))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    rows = visitor.saved("Export JSONL")
    assert [row["messages"][1]["content"] for row in rows] == ["terse says", "base says"]


@pytest.mark.slow
def test_a_blind_vote_hides_names_until_it_is_given_and_makes_pairs(visitor, script):
    script.answers["terse", "go"] = ["short"]
    script.answers["Qwen3-0.6B-4bit", "go"] = ["long"]
    visitor.compare(blind=True)
    visitor.say("go")
    main = visitor.page.locator("main")
    expect(main).not_to_contain_text("terse")
    assert "terse" not in visitor.page.locator("main").evaluate("one => one.outerHTML")
    names = ["A", "B"]
    expect(visitor.page.locator("article .name")).to_have_text(names)
    better = 0 if visitor.answers.nth(0).inner_text().count("short") else 1
    visitor.button(f"{names[better]} is better").click()
    expect(visitor.page.locator("article .name").nth(better)).to_have_text(
        f"{names[better]} · terse"
    )
    expect(visitor.page.locator(".vote")).to_contain_text(f"You preferred {names[better]} · terse")
    visitor.button("New blind round").click()
    expect(visitor.page.get_by_label("Model 1")).to_be_visible()
    visitor.say("go")
    expect(main).not_to_contain_text("terse")
    visitor.button("Tie").click()
    visitor.button("Votes").click()
    rows = visitor.page.locator("#tally tbody tr")
    expect(rows).to_have_text(["terse1010", "Qwen3-0.6B-4bit0110"])
    assert visitor.saved("Export pairs") == [
        {
            "messages": [{"role": "user", "content": "go"}],
            "chosen": "short",
            "rejected": "long",
        }
    ]


@pytest.mark.slow
def test_of_three_the_best_is_picked_and_beats_each_other(visitor, script):
    for name in ("terse", "Qwen3-0.6B-4bit", "poet"):
        script.answers[name, "go"] = [f"of {name}"]
    visitor.compare()
    visitor.button("Add a model").click()
    expect(visitor.page.get_by_label("Model 3")).to_have_value("poet")
    visitor.say("go")
    expect(visitor.answers).to_have_count(3)
    visitor.button("C is best").click()
    visitor.button("Votes").click()
    pairs = visitor.saved("Export pairs")
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [
        ("of poet", "of terse"),
        ("of poet", "of Qwen3-0.6B-4bit"),
    ]


@pytest.mark.slow
def test_blind_columns_are_in_a_drawn_order(visitor):
    orders = visitor.page.evaluate(
        """async () => {
          const { drawOrder, newConversation } = await import("/page/conversation.js");
          const drawn = Array.from({ length: 600 }, () => {
            const conversation = newConversation({ models: ["a", "b", "c"], blind: true });
            drawOrder(conversation);
            return conversation.models.join("");
          });
          return [...new Set(drawn)].map((one) => drawn.filter((each) => each === one).length);
        }"""
    )
    assert len(orders) == 6 and min(orders) > 50


@pytest.mark.slow
def test_the_order_is_drawn_only_once_nobody_can_see_it(visitor):
    visitor.compare()
    for _ in range(8):  # a drawn order would show in one of them
        visitor.page.get_by_label("Blind").uncheck()
        visitor.page.get_by_label("Blind").check()
        expect(visitor.page.get_by_label("Model 1")).to_have_value("terse")
        expect(visitor.page.get_by_label("Model 2")).to_have_value(BASE)


@pytest.mark.slow
def test_a_vote_waits_for_all_answers_and_needs_each(visitor, script):
    gate = Gate()
    script.answers["terse", "go"] = ["fine", gate]
    script.answers["Qwen3-0.6B-4bit", "go"] = [Refusal(503, "no room")]
    visitor.compare()
    visitor.say("go", wait=False)
    expect(visitor.page.locator(".vote")).to_have_text("Vote when all have answered.")
    gate.open()
    expect(visitor.page.locator(".vote")).to_have_text("A vote needs an answer of each.")
    script.answers["Qwen3-0.6B-4bit", "go"] = ["now"]
    visitor.button("Try again").click()
    expect(visitor.button("A is better")).to_be_visible()


# What goes wrong


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


# What a model may write


HOSTILE = {
    "script": "<script>alert(1)</script><img src=x onerror=alert(1)><svg onload=alert(1)>",
    "closing": "```\n</script><script>alert(1)</script>\n```\n</textarea></div></article>",
    "links": (
        "[a](javascript:alert(1)) [b](data:text/html,<script>alert(1)</script>) "
        "[c](vbscript:x) [d](JaVaScRiPt:alert(1)) [e](java\nscript:alert(1)) "
        "<javascript:alert(1)> [f](//evil.example) [g](/v1/models) [h](blob:x) "
        '[i](https://ok.example" onclick="alert(1)) [j]( javascript:alert(1))'
    ),
    "images": (
        "![a](https://evil.example/pixel.png) ![b](data:image/svg+xml,<svg onload=alert(1)>) "
        "![c](/v1/models) <img src='https://evil.example/p.png'> ![](http://evil.example/q)"
    ),
    "styles": "<style>*{display:none}</style><link rel=stylesheet href=//evil.example/x.css>",
    "tables": "|a|b|\n|-|-|\n|<b onclick=alert(1)>|[x](javascript:alert(1))|\n" * 3,
    "turned": "abc \u202egnp.exe\u202c [safe\u202e](https://e.example/\u202egnp) `a\u2066b`",
    "quotes": ">" * 10_000 + " deep",
    "quotes apart": "> " * 10_000 + "deep",
    "lists": "- " * 10_000 + "deep",
    "numbers": "1. " * 10_000 + "deep",
    "steps": "\n".join(" " * n + "- x" for n in range(0, 2000, 2)),
    "mixed": "> - 1. " * 3_000 + "deep",
    "stars": "*" * 100_000 + "a" + "*" * 100_000,
    "openers": "*a **b _c ~~d [e ![f `g " * 8_000,
    "brackets": "[" * 50_000 + "](" * 50_000,
    "pairs": "[a](b " * 10_000 + '"' + "](c(" * 10_000,
    "ticks": "".join("`" * n + " " for n in range(1, 400)),
    "fences": "```\n" * 4_001,
    "bars": "|" * 60_000 + "\n" + "|-" * 1_900,
    "hashes": "# " + " " * 90_000 + "#" * 1000 + "x",
    "dashes": "- - - " * 20_000 + "x",
    "names": "__proto__ constructor ```__proto__\nx\n```",
    "signs": "\x00\x07\ufffe\ud83d\ude00\u0300" * 2000,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_output_is_only_shown(visitor, script, kind):
    text = HOSTILE[kind]
    script.answers["go"] = [text[at : at + 50_000] for at in range(0, len(text), 50_000)]
    visitor.say("go")
    prose = visitor.answers.locator(".prose:not(.reasoning *)")
    allowed = {"P", "A", "EM", "STRONG", "DEL", "CODE", "PRE", "SPAN", "DIV", "UL", "OL", "LI"}
    allowed |= {"INPUT", "BLOCKQUOTE", "HR", "H3", "H4", "H5", "H6", "BUTTON", "FIGURE", "svg"}
    allowed |= {"FIGCAPTION", "TABLE", "THEAD", "TBODY", "TR", "TH", "TD", "path"}
    tags, depth, links, names = prose.evaluate(
        """(prose) => {
          const all = [...prose.querySelectorAll("*")];
          const depth = (one) => { let n = 0; for (; one !== prose; one = one.parentElement) n++;
            return n; };
          return [
            [...new Set(all.map((one) => one.nodeName))],
            Math.max(0, ...all.slice(-50).map(depth)),
            [...prose.querySelectorAll("a")].map((a) => [a.protocol, a.rel, a.target]),
            [...new Set(all.flatMap((one) => one.getAttributeNames()))],
          ];
        }"""
    )
    assert set(tags) <= allowed
    assert depth < 80
    for link in links:
        assert link[0] in ("http:", "https:", "mailto:")
        assert link[1:] == ["noopener noreferrer", "_blank"]
    assert not [name for name in names if name.startswith("on") or name in ("src", "style")]
    if kind == "script":
        expect(prose).to_contain_text("<script>alert(1)</script>")
    if kind == "images":
        expect(prose.locator("a.image")).to_have_text(["a", "image"])
    if kind == "turned":
        expect(prose.locator(".turning").first).to_have_attribute("data-code", "U+202E")
    visitor.say("still there?")
    expect(visitor.answers.nth(1)).to_contain_text("terse heard: stillthere?")
    visitor.page.reload()  # it is as harmless when it comes from storage
    expect(visitor.answers).to_have_count(2)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["{}", "```\n{}\n```", "- {}", "# {}", "|a|\n|-|\n|{}|"])
def test_a_line_of_a_megabyte_is_shown_whole(visitor, script, wrap):
    text = wrap.format("x*[`<y " * 150_000)
    script.answers["go"] = [text[at : at + 100_000] for at in range(0, len(text), 100_000)]
    visitor.say("go")
    shown = visitor.answers.locator(".prose:not(.reasoning *)").evaluate("one => one.textContent")
    assert shown.count("x*[`<y") == 150_000
    visitor.say("still there?")
    expect(visitor.answers.nth(1)).to_contain_text("terse heard: stillthere?")


@pytest.mark.slow
def test_names_of_models_are_only_text(visitor, script):
    name = "<img src=x onerror=alert(1)>"
    script.models.append(model(name))
    visitor.open()
    visitor.page.get_by_label("Model", exact=True).select_option(name)
    visitor.say(name)
    visitor.page.reload()
    expect(visitor.page.locator("#conversations .title")).to_have_text(name)
    assert visitor.page.locator("img").count() == 0


@pytest.mark.slow
def test_what_is_not_an_answer_is_said_to_be_none(visitor):
    visitor.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            status=200, content_type="text/event-stream", body="data: {nonsense\n\n"
        ),
    )
    visitor.say("go")
    expect(visitor.page.get_by_role("alert").filter(has_text="cannot be read")).to_be_visible()


# How it is drawn

GROW = """async ([text, sizes]) => {
  const { Prose } = await import("/page/prose.js");
  const [growing, whole] = [document.createElement("div"), document.createElement("div")];
  const prose = new Prose(growing);
  let at = 0;
  for (const size of sizes) prose.show(text.slice(0, (at += size)));
  prose.show(text);
  new Prose(whole).show(text);
  growing.normalize();
  whole.normalize();
  return growing.isEqualNode(whole);
}"""
PARTS = [
    *("# Head\n", "para *a* **b**\n", "\n", "\n\n", "- one\n", "  - two\n", "1. x\n", "2. y\n"),
    *("   more\n", "> quote\n", "> - in\n", "```py\n", "code *x*\n", "```\n", "| a | b |\n"),
    *("|---|---|\n", "| 1 | `2` |\n", "---\n", "[l](https://e.example/x)", "- [ ] t\n", "~~d~~ "),
    *("    deep\n", "* * *\n", "word ", "http://a.example. ", "\\* ", "![i](http://e.example) "),
]


@pytest.mark.slow
def test_text_that_grew_is_drawn_as_text_that_came_whole(visitor):
    chance = random.Random(3)
    for _ in range(150):
        text = "".join(chance.choice(PARTS) for _ in range(chance.randint(1, 30)))
        sizes = [chance.randint(1, 9) for _ in range(len(text) // 4)]
        assert visitor.page.evaluate(GROW, [text, sizes]), text


MARKDOWN = {
    "a *b* **c** ***d*** `e` ~~f~~": (
        "<p>a <em>b</em> <strong>c</strong> <strong><em>d</em></strong> <code>e</code> "
        "<del>f</del></p>"
    ),
    "snake_case_name 2*3*4 a * b": "<p>snake_case_name 2<em>3</em>4 a * b</p>",
    "\\*not\\* \\`code\\`": "<p>*not* `code`</p>",
    "``a ` b`` and `*x*`": "<p><code>a ` b</code> and <code>*x*</code></p>",
    "**bold with `code` and *em***": (
        "<p><strong>bold with <code>code</code> and <em>em</em></strong></p>"
    ),
    "# A #\n### B": "<h3>A</h3><h5>B</h5>",
    "- a\n- b\n  - c\n\ntext": ("<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><p>text</p>"),
    "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "1. a\n  - b\n    - c\n2. d": (
        "<ol><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li><li>d</li></ol>"
    ),
    "1. a\n\n   b\n2. c": "<ol><li><p>a</p><p>b</p></li><li><p>c</p></li></ol>",
    "text\n- a\nlazy": "<p>text</p><ul><li>a\nlazy</li></ul>",
    "in 1986\n2. is no list": "<p>in 1986\n2. is no list</p>",
    "a\n---\nb": "<p>a</p><hr><p>b</p>",
    "> a\n> > b\n\nc": (
        "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"
    ),
    "<b>x</b> &amp;": "<p>&lt;b&gt;x&lt;/b&gt; &amp;amp;</p>",
    "| a | b |\n|:-:|--:|\n| 1 \\| 2 | `x|y` |\nend": (
        "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1 | 2</td>"
        "<td><code>x|y</code></td></tr></tbody></table><p>end</p>"
    ),
    "see https://e.example/a_(b). So": (
        '<p>see <a href="https://e.example/a_(b)">https://e.example/a_(b)</a>. So</p>'
    ),
    "[*x*](https://e.example 'T') <mailto:a@e.example>": (
        '<p><a href="https://e.example/"><em>x</em></a> '
        '<a href="mailto:a@e.example">a@e.example</a></p>'
    ),
    "[no](ftp://x) [[n]](y) [t]": "<p>[no](ftp://x) [[n]](y) [t]</p>",
    "~~~\n```\n~~~": "<pre><code>```</code></pre>",
    "- a\n  ```\n  x\n\n  y\n  ```": "<ul><li>a<pre><code>x\n\ny</code></pre></li></ul>",
}
BARE = """async (text) => {
  const { Prose } = await import("/page/prose.js");
  const place = document.createElement("div");
  new Prose(place).show(text);
  for (const one of place.querySelectorAll("figure")) one.replaceWith(one.querySelector("pre"));
  for (const one of place.querySelectorAll(".line, .table")) one.replaceWith(...one.childNodes);
  for (const one of place.querySelectorAll("*"))
    for (const name of one.getAttributeNames())
      if (!["href", "start"].includes(name)) one.removeAttribute(name);
  return place.innerHTML;
}"""


@pytest.mark.slow
def test_markdown_is_read_as_it_is_meant(visitor):
    for text, wanted in MARKDOWN.items():
        assert visitor.page.evaluate(BARE, text) == wanted, text


STEADY = """async (text) => {
  const { Prose } = await import("/page/prose.js");
  const place = document.createElement("div");
  place.className = "prose";
  document.body.append(place);
  const prose = new Prose(place);
  prose.show(text.slice(0, 400));
  const first = place.firstElementChild;
  const last = place.lastElementChild;
  getSelection().selectAllChildren(first);
  const chosen = String(getSelection());
  let removed = 0;
  const watch = new MutationObserver((changes) => {
    for (const change of changes) removed += change.removedNodes.length;
  });
  watch.observe(place, { childList: true, subtree: true });
  let touched = 0; // characters that were read again, over all steps
  for (let at = 400; at <= text.length; at += 40) {
    touched += at - prose.settled;
    prose.show(text.slice(0, at));
  }
  removed += watch.takeRecords().reduce((sum, one) => sum + one.removedNodes.length, 0);
  return [place.firstElementChild === first, place.contains(last),
          String(getSelection()) === chosen, removed, touched / text.length];
}"""


@pytest.mark.slow
def test_growing_text_keeps_its_nodes_and_selection_and_reads_only_its_end(visitor):
    paragraph = "All words of this paragraph are plain and there are quite a few of them. " * 4
    text = (paragraph + "\n\n") * (20_000 // len(paragraph))
    same, kept, chosen, removed, read = visitor.page.evaluate(STEADY, text)
    assert same and kept and chosen
    assert removed == 0
    assert read < 12  # times the text, where all of it anew each time would be some 250


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 800, 1440])
def test_nothing_is_wider_than_the_window(visitor, script, width):
    visitor.page.set_viewport_size({"width": width, "height": 800})
    wide = "x" * 300
    script.answers["go"] = [f"{wide}\n\n```\n{wide}\n```\n\n|a|{wide}|\n|-|-|\n|`{wide}`|b|\n"]
    visitor.say("go")
    visitor.say(wide)
    visitor.compare()
    visitor.say("go")
    for _ in range(2):
        overflow = visitor.page.evaluate(
            """() => [...document.querySelectorAll("body, main, #thread, #bar, #bottom, article")]
              .filter((one) => one.scrollWidth > one.clientWidth + 1).map((one) => one.tagName)"""
        )
        assert overflow == []
        inside = visitor.field.bounding_box()
        assert inside["x"] >= 0 and inside["x"] + inside["width"] <= width
        visitor.page.evaluate("document.querySelectorAll('#conversations .title')[1].click()")
        expect(visitor.answers).to_have_count(2)


@pytest.mark.slow
def test_the_view_follows_the_answer_unless_one_reads_elsewhere(visitor, script):
    gates = Gate(), Gate()
    line = "a line\n\n"
    script.answers["go"] = [line * 60, gates[0], line * 60, gates[1], line * 60]
    visitor.say("go", wait=False)
    thread = visitor.page.locator("#thread")
    distance = "one => one.scrollHeight - one.scrollTop - one.clientHeight"
    lines = visitor.answers.locator("p")
    expect(lines).to_have_count(60)
    assert thread.evaluate(distance) < 2
    thread.evaluate("one => { one.scrollTop = 100; }")
    expect(visitor.button("To the end")).to_be_visible()
    gates[0].open()
    expect(lines).to_have_count(120)
    assert thread.evaluate("one => one.scrollTop") == 100
    visitor.button("To the end").click()
    gates[1].open()
    visitor.until_answered()
    assert thread.evaluate(distance) < 2


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_system_until_told_otherwise(visitor, scheme):
    visitor.page.emulate_media(color_scheme=scheme)
    back = "getComputedStyle(document.documentElement).backgroundColor"
    colours = {"light": "rgb(255, 255, 255)", "dark": "rgb(25, 25, 27)"}
    other = "dark" if scheme == "light" else "light"
    assert visitor.page.evaluate(back) == colours[scheme]
    visitor.button("Light or dark").click()
    assert visitor.page.evaluate(back) == colours[other]
    visitor.page.reload()
    assert visitor.page.evaluate(back) == colours[other]
    visitor.button("Light or dark").click()
    assert visitor.page.evaluate(back) == colours[scheme]


# With the server itself


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
