"""The chat page in a browser: whatever a model writes is only shown."""

import pytest
from browsing import browser, expect, script, visitor  # noqa: F401
from page_server import model

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
    "fences": "```\n" * 2_001,
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
