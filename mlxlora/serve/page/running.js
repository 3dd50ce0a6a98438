// An answer in the making: what is asked of the server, and its pieces put together.

import { messagesFor, newAnswer, textFor } from "./conversation.js";
import { Failure } from "./server.js";

export class Running {
  /** model: as /v1/models tells it, or as much as is known. sampling: what is not left to the
   * server. changed is called after every piece, and ended once. */
  constructor({ server, conversation, column, model, sampling, changed, ended }) {
    this.conversation = conversation;
    this.server = server;
    this.changed = changed;
    this.controller = new AbortController();
    const plain = Boolean(model.capabilities) && !model.capabilities.includes("chat");
    this.path = plain ? "completions" : "chat/completions";
    const said = plain
      ? { prompt: textFor(conversation, column) }
      : { messages: messagesFor(conversation, column) };
    this.request = { model: model.id, ...said, ...sampling };
    this.answer = newAnswer(model.id, plain);
    this.done = this.go().finally(() => ended(this));
  }

  stop() {
    this.controller.abort();
  }

  async go() {
    const { answer } = this;
    const { signal } = this.controller;
    const began = performance.now();
    let first = 0;
    try {
      for await (const piece of this.server.answer(this.path, this.request, signal)) {
        if (piece.text || piece.reasoning) {
          first ||= performance.now();
          answer.waited = (first - began) / 1000;
          answer.seconds = (performance.now() - first) / 1000;
        }
        answer.content += piece.text ?? "";
        answer.reasoning += piece.reasoning ?? "";
        answer.finish = piece.finish ?? answer.finish;
        answer.usage = piece.usage ?? answer.usage;
        this.changed(this);
      }
    } catch (error) {
      if (signal.aborted) answer.finish = "stopped";
      else if (error instanceof Failure) {
        const { kind, message, seconds } = error;
        answer.failure = { kind, message, seconds };
      } else throw error;
    }
  }
}
