// The conversation at hand: sent, answered, stopped, edited, voted on, and kept.

import { drawOrder, isComparison, newConversation } from "./conversation.js";
import { say, toast } from "./dom.js";
import { shortName } from "./picker.js";
import { RoundView } from "./round.js";
import { Running } from "./running.js";

const NEAR = 80; // pixels from the end within which the view follows what is written

export class Chat {
  /** modelOf(id): what is known of a model; sampling(): what is not left to the server; changed():
   * the list, the picker or the buttons may have to say something else; failed(failure). */
  constructor({ server, store, votes, modelOf, sampling, changed, failed }) {
    Object.assign(this, { server, store, votes, modelOf, sampling, changed, failed });
    this.running = new Map(); // answer -> Running, of any conversation
    this.place = document.getElementById("thread");
    this.rounds = document.getElementById("rounds");
    this.latest = document.getElementById("latest");
    this.follows = true;
    this.views = [];
    this.conversation = null;
    this.place.addEventListener("scroll", () => this.scrolled(), { passive: true });
    this.latest.addEventListener("click", () => this.toEnd());
  }

  /** Those of the conversation that is shown. */
  get answering() {
    return [...this.running.values()].filter((one) => one.conversation === this.conversation);
  }

  begin(models, { blind = false, system = "" } = {}) {
    this.show(newConversation({ models, blind, system }));
  }

  /** The conversation as it is now, which may be further than what is kept; null if none. */
  find(id) {
    if (id === this.conversation?.id) return this.conversation;
    const going = [...this.running.values()].find((one) => one.conversation.id === id);
    return going?.conversation ?? this.store.load(id);
  }

  /** False if there is no such conversation. */
  open(id) {
    const conversation = this.find(id);
    if (conversation) this.show(conversation);
    return conversation !== null;
  }

  show(conversation) {
    this.conversation = conversation;
    this.views = conversation.rounds.map((round) => this.view(round));
    this.rounds.replaceChildren(...this.views.map((view) => view.element));
    this.changed();
    this.toEnd();
  }

  view(round) {
    const { conversation } = this;
    return new RoundView(conversation, round, {
      label: shortName,
      runningOf: (answer) => this.running.has(answer),
      resized: () => this.grown(),
      actions: {
        edit: (prompt) => this.edit(round, prompt),
        again: (column) => this.again(column),
        vote: (choice) => this.vote(choice),
        anew: () => this.begin(conversation.models, conversation),
      },
    });
  }

  /** Ask all models. False if that cannot be now. */
  send(prompt) {
    const { conversation } = this;
    if (this.answering.length || conversation.models.some((model) => !model)) return false;
    drawOrder(conversation);
    const round = { prompt, answers: conversation.models.map(() => null), vote: null };
    conversation.rounds.push(round);
    for (const column of conversation.models.keys()) round.answers[column] = this.run(column);
    const view = this.view(round);
    this.views.push(view);
    this.rounds.append(view.element);
    this.views.at(-2)?.refresh();
    this.keep(conversation);
    say(isComparison(conversation) ? "The models are answering" : "The model is answering");
    this.toEnd();
    return true;
  }

  /** The answer of a column of the last round, in the making. */
  run(column) {
    const { conversation } = this;
    const running = new Running({
      ...{ server: this.server, conversation, column },
      model: this.modelOf(conversation.models[column]),
      sampling: this.sampling(),
      changed: ({ answer }) => this.viewOf(answer)?.grow(),
      ended: (ended) => this.ended(ended),
    });
    this.running.set(running.answer, running);
    return running.answer;
  }

  viewOf(answer) {
    return this.views.flatMap((round) => round.views).find((view) => view.answer === answer);
  }

  ended({ answer, conversation }) {
    this.running.delete(answer);
    if (this.store.known.has(conversation.id)) this.keep(conversation);
    this.viewOf(answer)?.end();
    this.views.at(-1)?.refresh();
    if (answer.failure) this.failed(answer.failure);
    if (conversation !== this.conversation || this.answering.length) return;
    say(answer.failure ? "" : answer.finish === "stopped" ? "Stopped" : "The answer is complete");
    this.changed();
  }

  stop() {
    for (const one of this.answering) one.stop();
  }

  /** Have an answer of the last round once more. */
  again(column) {
    const round = this.conversation.rounds.at(-1);
    if (this.running.has(round.answers[column])) return;
    round.answers[column] = this.run(column);
    this.views.at(-1).replace(column, round.answers[column], () => this.grown());
    this.keep(this.conversation);
  }

  /** Answers that failed for a reason of this kind, once more. */
  retry(kind) {
    const answers = this.conversation.rounds.at(-1)?.answers ?? [];
    for (const [column, { failure }] of answers.entries()) if (failure?.kind === kind) this.again(column);
  }

  /** Say something else at a round; what came after it is dropped. */
  edit(round, prompt) {
    this.stop();
    const { conversation } = this;
    for (const answer of round.answers) this.running.delete(answer);
    const at = conversation.rounds.indexOf(round);
    for (const { answers } of conversation.rounds.splice(at)) {
      for (const answer of answers) this.running.delete(answer);
    }
    for (const view of this.views.splice(at)) view.element.remove();
    this.send(prompt);
    document.getElementById("message").focus();
  }

  editLast() {
    this.views.at(-1)?.edit();
  }

  vote(choice) {
    const { conversation } = this;
    if (!this.votes.add(conversation, choice)) toast("The browser could not keep the vote.");
    conversation.rounds.at(-1).vote = choice;
    conversation.revealed = true;
    for (const view of this.views) view.refresh();
    this.keep(conversation);
    say(`Voted. ${conversation.models.map(shortName).join(", ")}`);
    this.grown();
  }

  /** Stop what belongs to a conversation and forget it; it can be kept again. */
  drop(id) {
    for (const one of this.running.values()) if (one.conversation.id === id) one.stop();
    this.store.remove(id);
  }

  keep(conversation) {
    if (!conversation.rounds.length) return;
    conversation.updated = Date.now();
    const [kept, dropped] = this.store.save(conversation);
    if (!kept) toast("This conversation is too long to be kept in the browser.");
    else if (dropped) toast("The oldest conversations were dropped to make room.");
    this.changed();
  }

  /** The page is left: what has come so far is kept. */
  leave() {
    for (const one of this.running.values()) {
      one.stop();
      one.answer.finish = "stopped";
      this.store.save(one.conversation);
    }
  }

  get distance() {
    const { scrollHeight, scrollTop, clientHeight } = this.place;
    return scrollHeight - scrollTop - clientHeight;
  }

  scrolled() {
    this.follows = this.distance < NEAR;
    this.latest.hidden = this.follows;
  }

  grown() {
    if (this.follows) this.place.scrollTop = this.place.scrollHeight;
    else this.latest.hidden = this.distance < NEAR;
  }

  toEnd() {
    this.follows = true;
    this.latest.hidden = true;
    this.place.scrollTop = this.place.scrollHeight;
  }
}
