// Markdown as nodes, and text that grows while it is read.
//
// Blocks that are complete are never touched again; of the last one, only what differs is
// changed, so that a selection stays and nothing flickers.

import { parseBlocks } from "./blocks.js";
import { element, icon } from "./dom.js";
import { inline, plain } from "./inline.js";

const PIECE = 20_000; // characters of text in one box: browsers lay out whole boxes

const MAKERS = {
  heading: ({ level, text }) => element(`h${Math.min(level + 2, 6)}`, {}, ...inline(text)),
  paragraph: ({ text }) =>
    text.length > PIECE ? pieces(text) : element("p", { dir: "auto" }, ...inline(text)),
  rule: () => element("hr"),
  quote: ({ blocks }) => element("blockquote", { dir: "auto" }, ...blocks.map(node)),
  code: codeBlock,
  list,
  table,
};

function node(block) {
  return MAKERS[block.kind](block);
}

/** A very long paragraph. Marks are not looked for: each would be laid out with all the rest. */
function pieces(text) {
  const cut = [];
  for (let at = 0; at < text.length; ) {
    const pair = /[\uDC00-\uDFFF]/.test(text[at + PIECE] ?? ""); // one character, not to be cut
    const end = at + PIECE + (pair ? 1 : 0);
    cut.push(element("p", { dir: "auto" }, ...plain(text.slice(at, end))));
    at = end;
  }
  return element("div", { class: "pieces" }, ...cut);
}

function codeBlock({ language, text }) {
  const button = { type: "button", class: "quiet", "aria-label": "Copy code", title: "Copy code" };
  return element(
    "figure",
    { class: "code" },
    element(
      "figcaption",
      {},
      element("span", {}, ...plain(language.slice(0, 40) || "text")),
      element("button", { ...button, data: { copy: "code" } }, icon("copy")),
    ),
    element("pre", { tabindex: "0", dir: "ltr" }, element("code", {}, ...plain(text))),
  );
}

function list(block) {
  const made = block.items.map(listItem(block));
  if (block.start === null) return element("ul", {}, ...made);
  return element("ol", { start: block.start === 1 ? null : block.start }, ...made);
}

function listItem({ loose }) {
  return ({ done, blocks }) => {
    const own = blocks.map((block) =>
      !loose && block.kind === "paragraph"
        ? element("span", { class: "line", dir: "auto" }, ...inline(block.text))
        : node(block),
    );
    const box = { type: "checkbox", disabled: true, checked: done, "aria-label": "done" };
    if (done !== null) own.unshift(element("input", box));
    return element("li", { class: done === null ? null : "task" }, ...own);
  };
}

function table(block) {
  const cell = cellOf("th", block.aligned);
  return element(
    "div",
    { class: "table", tabindex: "0" },
    element(
      "table",
      {},
      element("thead", {}, element("tr", {}, ...block.head.map(cell))),
      element("tbody", {}, ...block.rows.map(tableRow(block))),
    ),
  );
}

function tableRow({ aligned }) {
  return (row) => element("tr", {}, ...row.map(cellOf("td", aligned)));
}

function cellOf(name, aligned) {
  return (text, column) =>
    element(name, { class: aligned[column], dir: "auto" }, ...inline(text));
}

// Blocks that may go on for long: which of their parts, made how, stand where.
const LONG = {
  list: { parts: "items", make: listItem, place: (made) => made },
  table: { parts: "rows", make: tableRow, place: (made) => made.querySelector("tbody") },
  quote: { parts: "blocks", make: () => node, place: (made) => made },
};

/** Make the node of a block show what the block has become: parts that are the same stay. */
function renew(old, before, block) {
  const { parts, make, place } = LONG[block.kind] ?? {};
  const shell = (one) => ({ ...one, [parts]: null, line: 0 });
  if (!parts || !same(shell(before), shell(block))) {
    morph(old.parentNode, old, [node(block)], old.nextSibling);
    return;
  }
  const parent = place(old);
  const kept = block[parts].findIndex((part, at) => !same(part, before[parts][at]));
  if (kept < 0 && before[parts].length === block[parts].length) return;
  const from = kept < 0 ? block[parts].length : kept;
  morph(parent, parent.children[from] ?? null, block[parts].slice(from).map(make(block)));
}

function same(one, other) {
  return JSON.stringify(one) === JSON.stringify(other);
}

/** The text shown in a container, which may grow. */
export class Prose {
  constructor(container, { markdown = true } = {}) {
    this.container = container;
    this.markdown = markdown;
    this.clear();
  }

  clear() {
    this.container.replaceChildren();
    this.text = "";
    this.settled = 0; // characters that are shown for good
    this.count = 0; // nodes that show them
    this.growing = null;
  }

  /** Show a text. If it continues the last one, what was complete stays as it is. */
  show(text) {
    if (!text.startsWith(this.text)) this.clear();
    this.text = text;
    const rest = text.slice(this.settled);
    if (!this.markdown) {
      morph(this.container, this.container.firstChild, [pieces(rest)]);
      return;
    }
    const blocks = parseBlocks(rest);
    const first = this.container.childNodes[this.count] ?? null;
    if (first && blocks.length) {
      const following = first.nextSibling;
      renew(first, this.growing, blocks[0]);
      morph(this.container, following, blocks.slice(1).map(node));
    } else morph(this.container, first, blocks.map(node));
    // A block is complete once another has begun: with a whole line, as half of one may yet turn
    // out to belong to the block before it.
    const whole = rest.split("\n").length - 1;
    let last = blocks.length - 1;
    while (last > 0 && blocks[last].line >= whole) last -= 1;
    if (last > 0) {
      this.settled += startOf(rest, blocks[last].line);
      this.count += last;
    }
    this.growing = blocks[Math.max(last, 0)]; // the first of those that are not complete
  }
}

function startOf(text, line) {
  let at = 0;
  for (let passed = 0; passed < line; passed++) at = text.indexOf("\n", at) + 1;
  return at;
}

/** Make the children of parent, from one up to another, equal to nodes with few changes. */
function morph(parent, from, nodes, end = null) {
  let old = from;
  for (const made of nodes) {
    const following = old === end ? end : old.nextSibling;
    if (old === end) parent.insertBefore(made, end);
    else if (!become(old, made)) old.replaceWith(made);
    old = following;
  }
  while (old !== end) {
    const following = old.nextSibling;
    old.remove();
    old = following;
  }
}

/** Make a node equal to another; false if they are too different. */
function become(old, made) {
  if (old.nodeName !== made.nodeName) return false;
  if (old.nodeType === Node.TEXT_NODE) {
    if (made.data === old.data) return true;
    if (made.data.startsWith(old.data)) old.appendData(made.data.slice(old.length));
    else old.data = made.data;
    return true;
  }
  if (old.namespaceURI !== made.namespaceURI || old.nodeName === "svg") return true;
  for (const { name } of [...old.attributes]) if (!made.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of made.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  morph(old, old.firstChild, [...made.childNodes]);
  return true;
}
