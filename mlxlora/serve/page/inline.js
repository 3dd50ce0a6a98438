// What stands in a line: emphasis, code, links. Text in, nodes out, in one pass.
//
// Every node is made by name and filled with text; a link is one only if its address is http,
// https or mailto. Images are never fetched: their description is shown, as a link.

import { element } from "./dom.js";

const DEEPEST = 24; // marks open at once; what is deeper stays text
const LONGEST = 100_000; // characters that are looked through for marks
const SPECIAL = /[\\`*_~[\]!<h]/g;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const ADDRESS = /https?:\/\/[^\s<>"`\\]+/y;
const ANGLED = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/y;
const TITLE = /[ \n]+(?:"[^"]*"|'[^']*')[ \n]*\)/y;
const TAGS = { "*": "em", _: "em", "**": "strong", __: "strong", "~~": "del" };
const TURNING = /[\u202A-\u202E\u2066-\u2069]/;
const EACH_TURNING = /([\u202A-\u202E\u2066-\u2069])/;

/** The address if it is one that may be followed, else null. */
export function safeAddress(text) {
  try {
    const url = new URL(text);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

/** Text as nodes. Characters that turn the direction of what follows are held in a box each, and
 * shown, so that nothing reads otherwise than it is written; what is copied still has them. */
export function plain(text) {
  if (!TURNING.test(text)) return [document.createTextNode(text)];
  return text.split(EACH_TURNING).map((part) => {
    if (!EACH_TURNING.test(part)) return document.createTextNode(part);
    const code = `U+${part.codePointAt(0).toString(16).toUpperCase()}`;
    return element("span", { class: "turning", data: { code } }, part);
  });
}

/** Nodes for a text with marks in it. */
export function inline(text) {
  if (text.length > LONGEST) return plain(text);
  return new Reader(text).read();
}

/** Something that was opened and may be closed: its mark, and the nodes since. */
class Frame {
  constructor(mark) {
    this.mark = mark;
    this.nodes = [];
    this.text = "";
  }

  flush() {
    if (this.text) this.nodes.push(...plain(this.text));
    this.text = "";
    return this.nodes;
  }
}

class Reader {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.frames = [new Frame("")];
    this.ticks = null; // where runs of backticks are, by their length, last first
  }

  get top() {
    return this.frames.at(-1);
  }

  read() {
    const { text } = this;
    while (this.at < text.length) {
      SPECIAL.lastIndex = this.at;
      const found = SPECIAL.exec(text);
      const next = found ? found.index : text.length;
      this.top.text += text.slice(this.at, next);
      this.at = next;
      if (found) this.special(found[0]);
    }
    while (this.frames.length > 1) this.undo();
    return this.top.flush();
  }

  special(character) {
    if (character === "\\") this.escaped();
    else if (character === "`") this.code();
    else if (character === "[") this.open("[");
    else if (character === "]") this.bracket();
    else if (character === "!") this.open(this.text[this.at + 1] === "[" ? "![" : "");
    else if (character === "<") this.angled();
    else if (character === "h") this.bare();
    else this.emphasis(character);
  }

  literal(count) {
    this.top.text += this.text.slice(this.at, this.at + count);
    this.at += count;
  }

  escaped() {
    const next = this.text[this.at + 1] ?? "";
    if (!/[!-/:-@[-`{-~]/.test(next)) return this.literal(1);
    this.at += 1;
    return this.literal(1);
  }

  node(made) {
    this.top.flush().push(made);
  }

  code() {
    const count = this.runOf("`");
    const end = this.closingTicks(count);
    if (end < 0) return this.literal(count);
    let inner = this.text.slice(this.at + count, end).replaceAll("\n", " ");
    if (inner.trim() && inner.startsWith(" ") && inner.endsWith(" ")) inner = inner.slice(1, -1);
    this.node(element("code", {}, ...plain(inner)));
    this.at = end + count;
  }

  /** Where the next run of exactly count backticks begins, after the one here; -1 if nowhere. */
  closingTicks(count) {
    if (!this.ticks) {
      this.ticks = new Map();
      for (const run of this.text.matchAll(/`+/g)) {
        const places = this.ticks.get(run[0].length) ?? [];
        places.push(run.index);
        this.ticks.set(run[0].length, places);
      }
      for (const places of this.ticks.values()) places.reverse();
    }
    const places = this.ticks.get(count) ?? [];
    while (places.length && places.at(-1) <= this.at) places.pop();
    return places.length ? places.at(-1) : -1;
  }

  runOf(character) {
    let end = this.at;
    while (this.text[end] === character) end += 1;
    return end - this.at;
  }

  open(mark) {
    if (!mark || this.frames.length > DEEPEST) return this.literal(Math.max(1, mark.length));
    this.frames.push(new Frame(mark));
    this.at += mark.length;
  }

  /** Take back the last mark that was opened: it was only text. */
  undo() {
    const { mark, nodes, text } = this.frames.pop();
    this.top.text += mark;
    if (nodes.length) this.top.flush().push(...nodes);
    this.top.text += text;
  }

  bracket() {
    const depth = this.frames.findLastIndex(({ mark }) => mark === "[" || mark === "![");
    if (depth < 0) return this.literal(1);
    while (this.frames.length > depth + 1) this.undo();
    const [address, end] = this.destination(this.at + 1);
    const safe = address === null ? null : safeAddress(address);
    const image = this.top.mark === "![";
    if (address === null || (safe === null && !image)) {
      this.undo();
      return this.literal(1);
    }
    const label = this.frames.pop().flush();
    const words = label.some((one) => one.nodeName === "A" || one.querySelector?.("a"))
      ? plain(label.map((one) => one.textContent).join(""))
      : label;
    if (image && !words.length) words.push(...plain("image"));
    const kind = image ? "image" : null;
    this.node(safe ? link(safe, words, kind) : element("span", { class: kind }, ...words));
    this.at = end;
  }

  /** [address, where it ends] of the "(address)" at a place; [null, 0] if there is none. */
  destination(from) {
    const { text } = this;
    if (text[from] !== "(") return [null, 0];
    let depth = 1;
    let at = from + 1;
    for (; at < text.length && depth > 0; at++) {
      const character = text[at];
      if (character === " " || character === "\n") break;
      if (character === "(") depth += 1;
      if (character === ")") depth -= 1;
      if (depth > 8) return [null, 0];
    }
    const address = (end) => text.slice(from + 1, end).replace(/^<(.*)>$/, "$1");
    if (depth === 0) return [address(at - 1), at];
    TITLE.lastIndex = at;
    return depth === 1 && TITLE.test(text) ? [address(at), TITLE.lastIndex] : [null, 0];
  }

  angled() {
    ANGLED.lastIndex = this.at;
    const found = ANGLED.exec(this.text);
    const safe = found && safeAddress(found[1]);
    if (!safe) return this.literal(1);
    this.node(link(safe, plain(found[1].replace(/^mailto:/, ""))));
    this.at += found[0].length;
  }

  bare() {
    ADDRESS.lastIndex = this.at;
    const found = /\w/.test(this.text[this.at - 1] ?? " ") ? null : ADDRESS.exec(this.text);
    if (!found) return this.literal(1);
    const address = trimmed(found[0]);
    const safe = safeAddress(address);
    if (!safe) return this.literal(1);
    this.node(link(safe, plain(address)));
    this.at += address.length;
  }

  emphasis(character) {
    const count = this.runOf(character);
    const fits = character === "~" ? count === 2 : count <= 3;
    if (!fits) return this.literal(count);
    const before = this.text[this.at - 1] ?? " ";
    const after = this.text[this.at + count] ?? " ";
    const [opens, closes] = flanks(character, before, after);
    let left = count;
    while (closes && left > 0) {
      const length = this.close(character, left);
      if (!length) break;
      left -= length;
    }
    while (opens && left > 0 && this.frames.length <= DEEPEST) {
      const length = Math.min(left, 2);
      this.open(character.repeat(length));
      left -= length;
    }
    if (left) this.literal(left);
  }

  /** Close the innermost mark of this character that is no longer than most; its length, or 0. */
  close(character, most) {
    const stop = this.frames.findLastIndex(({ mark }) => mark === "[" || mark === "![");
    const depth = this.frames.findLastIndex(
      ({ mark }) => mark[0] === character && mark.length <= most,
    );
    if (depth <= Math.max(stop, 0)) return 0;
    while (this.frames.length > depth + 1) this.undo();
    const frame = this.frames.pop();
    this.node(element(TAGS[frame.mark], {}, ...frame.flush()));
    this.at += frame.mark.length;
    return frame.mark.length;
  }
}

/** Whether a run of marks may open and may close emphasis, by what stands around it. */
function flanks(character, before, after) {
  const [spaceBefore, spaceAfter] = [/\s/.test(before), /\s/.test(after)];
  const [signBefore, signAfter] = [PUNCTUATION.test(before), PUNCTUATION.test(after)];
  const left = !spaceAfter && (!signAfter || spaceBefore || signBefore);
  const right = !spaceBefore && (!signBefore || spaceAfter || signAfter);
  if (character !== "_") return [left, right];
  return [left && (!right || signBefore), right && (!left || signAfter)];
}

/** A bare address without what ends the sentence around it. */
function trimmed(address) {
  let end = address.length;
  let open = 0;
  for (const character of address) open += character === "(" ? 1 : character === ")" ? -1 : 0;
  for (; end > 0; end--) {
    const last = address[end - 1];
    if (last === ")" && open < 0) open += 1;
    else if (!".,;:!?*_~'\"]".includes(last)) break;
  }
  return address.slice(0, end);
}

function link(href, words, kind = null) {
  const attributes = { href, title: href, class: kind, target: "_blank", rel: "noopener noreferrer" };
  return element("a", attributes, ...words);
}
