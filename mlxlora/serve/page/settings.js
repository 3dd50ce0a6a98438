// The settings: what the model is told first, and how its words are drawn. What is left empty is
// left to the server.

import { element, textButton } from "./dom.js";
import { remember, remembered } from "./store.js";

// A setting of the server's that the page knows: one line here.
const FIELDS = [
  {
    name: "temperature",
    label: "Temperature",
    hint: "0 always takes the likeliest word; higher is more varied. 0 to 2.",
    limits: { min: 0, max: 2, step: "any" },
  },
  {
    name: "top_p",
    label: "Top p",
    hint: "Draws only from the likeliest words that share this much probability. 0 to 1.",
    limits: { min: 0.01, max: 1, step: "any" },
  },
  {
    name: "max_tokens",
    label: "Max tokens",
    hint: "Where an answer is ended at the latest.",
    limits: { min: 1, max: 1_000_000, step: 1 },
  },
  {
    name: "seed",
    label: "Seed",
    hint: "The same seed gives the same answer again.",
    limits: { min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 },
  },
];
const UNSET = { seed: "drawn anew each time" };

export class Settings {
  /** changed is called after every change. */
  constructor(storage, { changed }) {
    this.storage = storage;
    this.changed = changed;
    this.dialog = document.getElementById("settings");
    this.sampling = this.stored();
    this.system = String(remembered(storage, "system", ""));
    this.inputs = new Map();
    this.prompt = element("textarea", { id: "system", rows: 5, dir: "auto" });
    this.prompt.placeholder = "None";
    this.prompt.addEventListener("input", () => {
      this.system = this.prompt.value;
      remember(this.storage, "system", this.system);
      this.changed();
    });
    this.build();
  }

  get isDefault() {
    return !this.system.trim() && !Object.keys(this.sampling).length;
  }

  /** Show them; length: how many tokens the model reads, Infinity if nobody knows. */
  open(length) {
    this.length.textContent = Number.isFinite(length)
      ? `The model reads ${length.toLocaleString("en")} tokens in all, its answer included.`
      : "";
    this.fill();
    this.dialog.showModal();
  }

  /** The system prompt of the conversation at hand. */
  setSystem(text) {
    this.system = text;
    this.fill();
  }

  stored() {
    const kept = remembered(this.storage, "sampling", {});
    const numbers = FIELDS.filter(({ name }) => Number.isFinite(kept?.[name]));
    return Object.fromEntries(numbers.map(({ name }) => [name, kept[name]]));
  }

  fill() {
    this.prompt.value = this.system;
    for (const [name, { input, note }] of this.inputs) {
      input.value = this.sampling[name] ?? "";
      input.removeAttribute("aria-invalid");
      note.classList.remove("wrong");
    }
  }

  build() {
    this.length = element("p", { class: "hint" });
    const reset = textButton("Back to the server's defaults", () => this.reset());
    const close = textButton("Done", () => this.dialog.close(), { class: "primary" });
    this.dialog.append(
      element("h2", {}, "Settings"),
      element("label", { for: "system" }, "System prompt"),
      element("p", { class: "hint" }, "What the model is told before everything else."),
      this.prompt,
      element("div", { class: "fields" }, ...FIELDS.map((field) => this.field(field))),
      this.length,
      shortcuts(),
      element("div", { class: "row" }, reset, close),
    );
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close(); // beside it
    });
  }

  field({ name, label, hint, limits }) {
    const placeholder = UNSET[name] ?? "server's default";
    const note = element("p", { class: "hint", id: `${name}-hint` }, hint);
    const input = element("input", {
      ...{ id: name, type: "number", inputmode: "decimal", placeholder, ...limits },
      "aria-describedby": `${name}-hint`,
      oninput: () => this.take(name, input, note),
    });
    this.inputs.set(name, { input, note });
    return element("div", {}, element("label", { for: name }, label), input, note);
  }

  take(name, input, note) {
    const valid = input.checkValidity();
    note.classList.toggle("wrong", !valid);
    if (valid) input.removeAttribute("aria-invalid");
    else input.setAttribute("aria-invalid", "true");
    delete this.sampling[name];
    if (valid && input.value !== "") this.sampling[name] = input.valueAsNumber;
    this.keep();
  }

  reset() {
    this.sampling = {};
    this.fill();
    this.keep();
  }

  keep() {
    remember(this.storage, "sampling", this.sampling);
    this.changed();
  }
}

function shortcuts() {
  const keys = [
    ["Enter", "send"],
    ["Shift Enter", "new line"],
    ["Esc", "stop"],
    ["↑", "edit the last message"],
    ["/", "write"],
    [navigator.platform.startsWith("Mac") ? "⌘ K" : "Ctrl K", "new conversation"],
  ];
  const rows = keys.flatMap(([key, does]) => [
    element("dt", {}, element("kbd", {}, key)),
    element("dd", {}, does),
  ]);
  return element(
    "details",
    { class: "shortcuts" },
    element("summary", {}, "Keyboard"),
    element("dl", {}, ...rows),
  );
}
