// Which models: one for a chat, two to four for a comparison.

import { MOST_MODELS, isComparison, namesHidden } from "./conversation.js";
import { element, iconButton } from "./dom.js";

/** The end of a long name, which is what tells models apart. */
export function shortName(model) {
  return model.split("/").filter(Boolean).at(-1) ?? model;
}

export class Picker {
  /** changed(models) is called when others are picked, blinded(yes) when the names should hide. */
  constructor({ changed, blinded }) {
    this.changed = changed;
    this.blinded = blinded;
    this.place = document.getElementById("picker");
  }

  show(conversation, models) {
    const focused = this.place.contains(document.activeElement) ? document.activeElement.id : "";
    this.place.replaceChildren(...this.parts(conversation, models));
    if (focused) document.getElementById(focused)?.focus();
  }

  parts(conversation, models) {
    const { models: picked, rounds, blind } = conversation;
    if (!isComparison(conversation)) return [this.select(picked, 0, models)];
    if (rounds.length) {
      // each column is a model's own history by now
      const names = picked.map(shortName).join(", ");
      const said = namesHidden(conversation) ? `${picked.length} models, names hidden` : names;
      return [element("span", { class: "hint" }, element("bdi", {}, said))];
    }
    const parts = picked.map((_, column) => this.select(picked, column, models));
    if (picked.length < MOST_MODELS) {
      parts.push(iconButton("plus", "Add a model", () => this.add(picked, models), { id: "add" }));
    }
    const box = element("input", { type: "checkbox", id: "blind", checked: blind });
    box.addEventListener("change", () => this.blinded(box.checked));
    const title = "Names are hidden and the order is drawn until you have voted";
    parts.push(element("label", { class: "check", title }, box, "Blind"));
    return parts;
  }

  select(picked, column, models) {
    const own = picked[column];
    const groups = [
      ["Base", models.filter(({ parent }) => !parent)],
      ["Adapters", models.filter(({ parent }) => parent)],
    ];
    const missing = models.every(({ id }) => id !== own);
    if (missing && own) groups.push(["Not served now", [{ id: own }]]);
    const made = groups
      .filter(([, members]) => members.length)
      .map(([label, members]) =>
        element(
          "optgroup",
          { label },
          ...members.map(({ id }) =>
            element("option", { value: id, title: id, selected: id === own }, shortName(id)),
          ),
        ),
      );
    const many = picked.length > 1;
    const label = many ? `Model ${column + 1}` : "Model";
    const select = element(
      "select",
      { id: `model-${column}`, "aria-label": label, title: own },
      ...made,
    );
    select.addEventListener("change", () =>
      this.changed(picked.map((model, at) => (at === column ? select.value : model))),
    );
    if (picked.length <= 2) return select;
    const remove = iconButton("close", `Remove ${shortName(own)}`, () =>
      this.changed(picked.filter((_, at) => at !== column)),
    );
    return element("span", { class: "removable" }, select, remove);
  }

  add(picked, models) {
    const fresh = models.find(({ id }) => !picked.includes(id)) ?? models[0];
    if (fresh) this.changed([...picked, fresh.id]);
  }
}
