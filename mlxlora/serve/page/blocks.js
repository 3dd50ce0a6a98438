// Markdown's blocks, as data: text in, headings, lists, tables, quotes, code and paragraphs out.
//
// What models write, read in one pass over the lines. Unlike CommonMark, three dashes under a
// paragraph are a rule and not a heading, indented lines are text and not code, and HTML is text.

const DEEPEST = 12; // quotes and lists in each other; what is deeper is shown as its text

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( {1,4}(?! )|[ \t]|$)/;
const DELIMITERS = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

/** The blocks of a text, each with the number of its first line. */
export function parseBlocks(text) {
  return parse(text.split("\n"), 0);
}

function parse(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [block, next] = blockAt(lines, at, depth);
    block.line = at;
    blocks.push(block);
    at = next;
  }
  return blocks;
}

/** The block that begins at a line, and the line after it. */
function blockAt(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return code(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) {
    const level = heading[1].length;
    return [{ kind: "heading", level, text: headingText(line.trim().slice(level)) }, at + 1];
  }
  if (isRule(line)) return [{ kind: "rule" }, at + 1];
  if (depth < DEEPEST && QUOTE.test(line)) return quote(lines, at, depth);
  if (depth < DEEPEST && ITEM.test(line)) return list(lines, at, depth);
  if (isTable(lines, at)) return table(lines, at);
  return paragraph(lines, at);
}

function isRule(line) {
  return line.length < 200 && RULE.test(line);
}

function headingText(text) {
  const closed = text.trim();
  const bare = closed.replace(/#+$/, "");
  return bare !== closed && (bare === "" || /[ \t]$/.test(bare)) ? bare.trim() : closed;
}

function code(lines, at, [opening, marks, language]) {
  const indent = opening.length - opening.trimStart().length;
  const own = [];
  let next = at + 1;
  let closed = false;
  for (; next < lines.length && !closed; next++) {
    const bare = lines[next].trim();
    closed = bare.length >= marks.length && isRun(bare, marks[0]) && indentOf(lines[next]) < 4;
    if (!closed) own.push(outdent(lines[next], indent));
  }
  return [{ kind: "code", language: language.trim().split(/[ \t]/)[0], text: own.join("\n") }, next];
}

function isRun(text, mark) {
  for (const character of text) if (character !== mark) return false;
  return true;
}

function quote(lines, at, depth) {
  let next = at;
  const own = [];
  for (; next < lines.length && QUOTE.test(lines[next]); next++) {
    own.push(lines[next].replace(QUOTE, ""));
  }
  return [{ kind: "quote", blocks: parse(own, depth + 1) }, next];
}

function list(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const kind = first[2].at(-1); // -, *, +, . or ): another begins another list
  const items = [];
  let loose = false;
  let next = at;
  while (next < lines.length) {
    const marker = ITEM.exec(lines[next]);
    if (!marker || marker[2].at(-1) !== kind || isRule(lines[next])) break;
    const [own, after, apart] = item(lines, next, marker);
    items.push(own);
    const ended = after > next && after < lines.length && !lines[after - 1].trim();
    next = after;
    const more = next < lines.length && ITEM.test(lines[next]);
    loose ||= apart || (ended && more);
  }
  const made = items.map((own) => {
    const task = /^\[([ xX])\] /.exec(own[0]);
    if (task) own[0] = own[0].slice(4);
    return { done: task ? task[1] !== " " : null, blocks: parse(own, depth + 1) };
  });
  const start = kind === "." || kind === ")" ? parseInt(first[2], 10) : null;
  return [{ kind: "list", start, loose, items: made }, next];
}

/** An item's lines, the line after it, and whether blank lines part its blocks. */
function item(lines, at, marker) {
  const base = marker[1].length;
  let width = base + marker[2].length + Math.max(1, marker[3].length);
  const own = [lines[at].slice(width)];
  let fence = FENCE.exec(own[0])?.[1] ?? "";
  let next = at + 1;
  let blank = false;
  let apart = false;
  for (; next < lines.length; next++) {
    const line = lines[next];
    if (!line.trim()) {
      blank = true;
      own.push("");
      continue;
    }
    const indent = indentOf(line);
    if (indent < width && indent >= base + 2 && !fence && ITEM.test(line.trimStart())) {
      width = indent; // a list in this item, indented less than it should be
    }
    const nested = indent >= width;
    if (!nested && (fence || blank || ITEM.test(line) || startsBlock(lines, next))) break;
    apart ||= blank && nested && !fence && !ITEM.test(line.trimStart());
    blank = false;
    own.push(nested ? outdent(line, width) : line.trimStart());
    const bare = line.trim();
    if (!fence) fence = FENCE.exec(own.at(-1))?.[1] ?? "";
    else if (bare.length >= fence.length && isRun(bare, fence[0])) fence = "";
  }
  while (own.length > 1 && !own.at(-1)) own.pop();
  return [own, next, apart];
}

/** Whether a line ends the paragraph before it. */
function startsBlock(lines, at) {
  const line = lines[at];
  if (FENCE.test(line) || HEADING.test(line) || isRule(line) || QUOTE.test(line)) return true;
  const marker = ITEM.exec(line);
  if (marker && marker[3] && (/\D/.test(marker[2][0]) || parseInt(marker[2], 10) === 1)) return true;
  return isTable(lines, at);
}

function isTable(lines, at) {
  const below = lines[at + 1];
  if (below === undefined || !lines[at].includes("|") || !below.includes("-")) return false;
  if (below.length > 4000 || !DELIMITERS.test(below)) return false;
  return cells(lines[at]).length === cells(below).length;
}

function table(lines, at) {
  const head = cells(lines[at]);
  const aligned = cells(lines[at + 1]).map((cell) => {
    if (cell.endsWith(":")) return cell.startsWith(":") ? "center" : "right";
    return "left";
  });
  const rows = [];
  let next = at + 2;
  for (; next < lines.length && lines[next].trim() && !beginsOther(lines[next]); next++) {
    const row = cells(lines[next]).slice(0, head.length);
    rows.push([...row, ...Array(head.length - row.length).fill("")]);
  }
  return [{ kind: "table", head, aligned, rows }, next];
}

function beginsOther(line) {
  return FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || !line.includes("|");
}

/** The cells of a row: parted by bars that are neither escaped nor in code. */
function cells(line) {
  let row = line.trim();
  if (row.startsWith("|")) row = row.slice(1);
  const found = [];
  let cell = "";
  let inCode = false;
  for (let at = 0; at < row.length; at++) {
    const character = row[at];
    if (character === "\\" && row[at + 1] === "|") {
      cell += "|";
      at += 1;
    } else if (character === "|" && !inCode) {
      found.push(cell.trim());
      cell = "";
    } else {
      if (character === "`") inCode = inCode ? false : row.indexOf("`", at + 1) > 0;
      cell += character;
    }
  }
  if (cell.trim()) found.push(cell.trim());
  return found;
}

function paragraph(lines, at) {
  let next = at + 1;
  while (next < lines.length && lines[next].trim() && !startsBlock(lines, next)) next += 1;
  const text = lines.slice(at, next).map((line) => line.trim());
  return [{ kind: "paragraph", text: text.join("\n") }, next];
}

function indentOf(line) {
  let count = 0;
  for (const character of line) {
    if (character === " ") count += 1;
    else if (character === "\t") count += 4;
    else break;
  }
  return count;
}

/** A line without so many columns of its indent. */
function outdent(line, columns) {
  let left = columns;
  let at = 0;
  for (; at < line.length && left > 0; at++) {
    if (line[at] === " ") left -= 1;
    else if (line[at] === "\t") left -= 4;
    else break;
  }
  return line.slice(at);
}
