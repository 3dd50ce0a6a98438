// Elements, made node by node: nothing here or elsewhere turns text into markup.

const SVG = "http://www.w3.org/2000/svg";
const ICONS = {
  arrow: "M12 19V5M5 12l7-7 7 7",
  check: "M5 12.5l5 5 9-11",
  close: "M6 6l12 12M18 6L6 18",
  columns: "M4 5h16v14H4zM12 5v14",
  copy: "M9 9h11v11H9zM15 9V4H4v11h5",
  down: "M12 5v14M5 12l7 7 7-7",
  edit: "M4 20l1-4L16.5 4.5l3 3L8 19zM14 7l3 3",
  menu: "M4 7h16M4 12h16M4 17h16",
  moon: "M20 14.5A8.5 8.5 0 0 1 9.5 4 8.5 8.5 0 1 0 20 14.5z",
  plus: "M12 5v14M5 12h14",
  redo: "M20 11a8 8 0 1 0-2.5 6.5M20 5v6h-6",
  sliders: "M4 8h9M19 8h1M4 16h1M11 16h9M16 5.5a2.5 2.5 0 1 1 0 5 2.5 2.5 0 0 1 0-5zM8 13.5a2.5 2.5 0 1 1 0 5 2.5 2.5 0 0 1 0-5z",
  stop: "M7 7h10v10H7z",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
};

/** An element. "onclick" and its like add listeners, "data" sets data attributes, null, undefined
 * and false leave an attribute out. Children that are strings become text. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "data") Object.assign(made.dataset, value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== false));
  return made;
}

export function icon(name) {
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("viewBox", "0 0 24 24");
  drawing.setAttribute("class", "icon");
  drawing.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  drawing.append(path);
  return drawing;
}

/** A button that is an icon; label is what is read out and shown when pointed at. */
export function iconButton(name, label, onclick, attributes = {}) {
  return element(
    "button",
    { type: "button", class: "quiet", "aria-label": label, title: label, onclick, ...attributes },
    icon(name),
  );
}

export function textButton(text, onclick, attributes = {}) {
  return element("button", { type: "button", onclick, ...attributes }, text);
}

/** Put text on the clipboard; false if the browser does not let us. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // clipboard is missing where the page came over plain HTTP from another machine
    const field = element("textarea", { class: "hidden", readonly: true });
    field.value = text;
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    return done;
  }
}

/** Copy, and let the button say so for a moment. */
export async function copyWith(button, text) {
  const done = await copy(text);
  button.replaceChildren(icon(done ? "check" : "close"));
  say(done ? "Copied" : "The browser did not let the page copy");
  setTimeout(() => button.replaceChildren(icon("copy")), 1500);
}

/** Save lines as a file. */
export function download(name, lines) {
  const url = URL.createObjectURL(
    new Blob(lines.map((line) => `${line}\n`), { type: "application/jsonl" }),
  );
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** Tell those who listen instead of look. */
export function say(text) {
  document.getElementById("status").textContent = text;
}

let gone = 0;

/** A line at the bottom, for a while, with something to do about it if action is given. */
export function toast(text, action = null) {
  const place = document.getElementById("toast");
  clearTimeout(gone);
  const act = () => {
    place.replaceChildren();
    action.run();
  };
  place.replaceChildren(
    element("div", { class: "toast" }, text, action && textButton(action.label, act)),
  );
  gone = setTimeout(() => place.replaceChildren(), 8000);
}
