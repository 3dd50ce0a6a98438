"""The chat page in a browser: Markdown, text that grows, widths, light and dark."""

import random

import pytest
from browsing import browser, expect, script, visitor  # noqa: F401
from page_server import Gate

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
