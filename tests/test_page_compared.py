"""The chat page in a browser: models side by side, and votes."""

import pytest
from browsing import browser, expect, script, visitor  # noqa: F401
from page_server import BASE, Gate, Refusal


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
