// A round as it is shown: the prompt, its answers side by side, and the vote between them.

import { AnswerView } from "./answer.js";
import { isComparison, letter, namesHidden } from "./conversation.js";
import { copyWith, element, iconButton, textButton } from "./dom.js";
import { plain } from "./inline.js";

export class RoundView {
  /** actions: edit(prompt), again(column), vote(choice), anew(): what may be done with it.
   * runningOf(answer) tells whether an answer is in the making. label(model) is its short name. */
  constructor(conversation, round, { actions, runningOf, label, resized }) {
    this.conversation = conversation;
    this.round = round;
    this.actions = actions;
    this.runningOf = runningOf;
    this.label = label;
    this.views = round.answers.map(
      (answer, column) =>
        new AnswerView(answer, {
          name: this.nameOf(column),
          running: runningOf(answer),
          resized,
        }),
    );
    this.prompt = element("div", { class: "prompt" });
    this.ballot = element("div", { class: "vote", role: "group", "aria-label": "Vote" });
    this.answers = element(
      "div",
      { class: "answers", data: { columns: round.answers.length } },
      ...this.views.map((view) => view.element),
    );
    this.element = element("section", { class: "round" }, this.prompt, this.answers, this.ballot);
    this.showPrompt();
    this.refresh();
  }

  get isLast() {
    return this.conversation.rounds.at(-1) === this.round;
  }

  get hidesNames() {
    return namesHidden(this.conversation);
  }

  nameOf(column) {
    if (!isComparison(this.conversation)) return this.label(this.round.answers[column].model);
    if (this.hidesNames) return letter(column);
    return `${letter(column)} · ${this.label(this.round.answers[column].model)}`;
  }

  /** An answer was begun anew. */
  replace(column, answer, resized) {
    const view = new AnswerView(answer, { name: this.nameOf(column), running: true, resized });
    this.views[column].element.replaceWith(view.element);
    this.views[column] = view;
    this.refresh();
  }

  /** Show what depends on other rounds, or on whether all is answered. */
  refresh() {
    for (const [column, view] of this.views.entries()) {
      view.rename(this.nameOf(column));
      view.element.classList.toggle("preferred", this.round.vote === column);
      const may = this.isLast && this.round.vote === null;
      view.setAgain(may ? () => this.actions.again(column) : null);
    }
    this.showBallot();
  }

  showPrompt() {
    const { prompt } = this.round;
    const copier = iconButton("copy", "Copy message", () => copyWith(copier, prompt));
    this.prompt.replaceChildren(
      element("div", { class: "bubble", dir: "auto" }, ...plain(prompt)),
      element(
        "div",
        { class: "buttons" },
        copier,
        iconButton("edit", "Edit message", () => this.edit()),
      ),
    );
  }

  /** Let the prompt be changed in its place; what follows it is dropped once it is sent. */
  edit() {
    const field = element("textarea", { "aria-label": "Edit message", rows: 1, dir: "auto" });
    field.value = this.round.prompt;
    const fit = () => {
      field.style.height = "auto";
      field.style.height = `${field.scrollHeight + 2}px`;
    };
    const cancel = () => {
      this.showPrompt();
      this.prompt.querySelector("[aria-label='Edit message']").focus();
    };
    const send = () => {
      if (field.value.trim()) this.actions.edit(field.value);
    };
    field.addEventListener("input", fit);
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      }
    });
    const note = this.isLast ? "" : "What follows is dropped.";
    const buttons = element(
      "div",
      { class: "row" },
      element("span", { class: "hint" }, note),
      textButton("Cancel", cancel, { class: "small" }),
      textButton("Send", send, { class: "small primary" }),
    );
    this.prompt.replaceChildren(element("div", { class: "editing" }, field, buttons));
    fit();
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }

  showBallot() {
    const { round } = this;
    const ready = round.answers.every(
      (answer) => !this.runningOf(answer) && answer.content && !answer.failure,
    );
    this.ballot.hidden = !isComparison(this.conversation) || (round.vote === null && !this.isLast);
    if (this.ballot.hidden) return;
    if (round.vote !== null) this.ballot.replaceChildren(...this.verdict());
    else if (ready) this.ballot.replaceChildren(...this.choices());
    else this.ballot.replaceChildren(element("span", { class: "hint" }, this.wait()));
  }

  wait() {
    const running = this.round.answers.some((answer) => this.runningOf(answer));
    return running ? "Vote when all have answered." : "A vote needs an answer of each.";
  }

  choices() {
    const two = this.round.answers.length === 2;
    const choice = (text, value) => textButton(text, () => this.actions.vote(value));
    return [
      ...this.round.answers.map((_, column) =>
        choice(`${letter(column)} is ${two ? "better" : "best"}`, column),
      ),
      choice("Tie", "tie"),
      choice(two ? "Both bad" : "All bad", "bad"),
    ];
  }

  verdict() {
    const { vote } = this.round;
    const words =
      vote === "tie"
        ? "A tie."
        : vote === "bad"
          ? "None was good."
          : `You preferred ${this.nameOf(vote)}.`;
    const { blind } = this.conversation;
    const anew = this.isLast
      ? textButton(blind ? "New blind round" : "New comparison", this.actions.anew)
      : null;
    return [element("span", {}, element("bdi", {}, words)), anew].filter(Boolean);
  }
}
