// The votes so far: which model was preferred how often, and the pairs to train on.

import { download, element, textButton, toast } from "./dom.js";
import { shortName } from "./picker.js";

export class Tally {
  constructor(votes) {
    this.votes = votes;
    this.dialog = document.getElementById("tally");
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close(); // beside it
    });
  }

  open() {
    this.fill();
    this.dialog.showModal();
  }

  fill() {
    const rows = this.votes.rows();
    const tally = this.votes.tally();
    const save = textButton("Export pairs", () => this.save());
    save.disabled = !rows.length;
    const clear = textButton("Clear", () => this.clear());
    clear.disabled = !tally.length;
    const close = textButton("Done", () => this.dialog.close(), { class: "primary" });
    this.dialog.replaceChildren(
      element("h2", {}, "Votes"),
      tally.length ? table(tally) : element("p", { class: "hint" }, "No votes yet: compare models."),
      element(
        "p",
        { class: "hint" },
        `${rows.length} ${rows.length === 1 ? "pair" : "pairs"} of a preferred and a beaten answer, `,
        "as rows of messages, chosen and rejected.",
      ),
      element("div", { class: "row" }, clear, save, close),
    );
  }

  save() {
    const rows = this.votes.rows().map((row) => JSON.stringify(row));
    download("preferences.jsonl", rows);
  }

  clear() {
    const before = this.votes.all;
    this.votes.clear();
    this.fill();
    this.dialog.close();
    toast("The votes are cleared.", { label: "Undo", run: () => this.votes.restore(before) });
  }
}

function table(tally) {
  const titles = ["Model", "Won", "Lost", "Tied", "All bad"];
  const head = element("tr", {}, ...titles.map((title) => element("th", { scope: "col" }, title)));
  const rows = tally.map(({ model, won, lost, tied, bad }) =>
    element(
      "tr",
      {},
      element("th", { scope: "row", title: model }, element("bdi", {}, shortName(model))),
      ...[won, lost, tied, bad].map((count) => element("td", {}, String(count))),
    ),
  );
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
}
