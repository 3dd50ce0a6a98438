"""The chat page in a browser: conversations that are kept, renamed, deleted and exported."""

import pytest
from browsing import browser, expect, script, visitor  # noqa: F401
from page_server import Gate

from mlxlora.data.formats import parse


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
