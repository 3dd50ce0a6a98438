// The list of conversations, and what can be done with them.

import { element, iconButton } from "./dom.js";

const DAY = 86_400_000; // milliseconds

export class Sidebar {
  /** actions: open(id), rename(id, title), remove(id). */
  constructor(actions) {
    this.actions = actions;
    this.place = document.getElementById("conversations");
    this.panel = document.getElementById("sidebar");
    this.shade = document.getElementById("shade");
    this.shade.addEventListener("click", () => this.toggle(false));
    document.getElementById("menu").addEventListener("click", () => this.toggle());
  }

  get isOpen() {
    return this.panel.classList.contains("open");
  }

  /** Over the page where it is narrow; beside it, or put away, where it is wide. */
  toggle(open = !this.isOpen) {
    this.panel.classList.toggle("open", open);
    this.shade.hidden = !open;
    document.getElementById("menu").setAttribute("aria-expanded", String(open));
  }

  /** entries: {id, title, updated}, newest first. */
  show(entries, current) {
    if (this.place.querySelector("input")) return; // one is being renamed
    const parts = [];
    let heading = "";
    for (const entry of entries) {
      const when = day(entry.updated);
      if (when !== heading) parts.push(element("li", { class: "day" }, when));
      heading = when;
      parts.push(this.item(entry, entry.id === current));
    }
    if (!parts.length) {
      parts.push(element("li", { class: "hint" }, "Conversations stay in this browser."));
    }
    this.place.replaceChildren(...parts);
  }

  item({ id, title }, isCurrent) {
    const open = element(
      "button",
      { type: "button", class: "title", title, "aria-current": isCurrent ? "true" : null },
      element("bdi", {}, title),
    );
    open.addEventListener("click", () => {
      this.toggle(false);
      this.actions.open(id);
    });
    const item = element(
      "li",
      { class: isCurrent ? "item current" : "item" },
      open,
      iconButton("edit", `Rename ${title}`, () => this.rename(item, id, title)),
      iconButton("trash", `Delete ${title}`, () => this.actions.remove(id)),
    );
    return item;
  }

  rename(item, id, title) {
    const field = element("input", { "aria-label": "Title", maxlength: 200, dir: "auto" });
    field.value = title;
    let ended = false;
    const end = (keep) => {
      if (ended) return;
      ended = true;
      field.remove();
      this.actions.rename(id, keep ? field.value.trim() : null);
    };
    field.addEventListener("blur", () => end(true));
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.isComposing) end(true);
      if (event.key === "Escape") {
        event.stopPropagation();
        end(false);
      }
    });
    item.replaceChildren(field);
    field.select();
  }
}

function day(time) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (time >= today) return "Today";
  if (time >= today - DAY) return "Yesterday";
  if (time >= today - 6 * DAY) return "Last seven days";
  return "Earlier";
}
