// Votes between answers: a tally by model, and pairs of answers to train on.

import { messagesFor, namesHidden } from "./conversation.js";
import { remember, remembered } from "./store.js";

const MOST = 1_000_000; // characters of pairs; those of the oldest votes go first

export class Votes {
  constructor(storage) {
    this.storage = storage;
  }

  /** [{models, winner, blind, at, rows}], the oldest first; winner: {column}, "tie" or "bad". */
  get all() {
    const kept = remembered(this.storage, "votes", []);
    return Array.isArray(kept) ? kept : [];
  }

  /** Count a vote on the last round: choice is a column, "tie" or "bad". False if it is not kept. */
  add(conversation, choice) {
    const { models } = conversation;
    const blind = namesHidden(conversation);
    const round = conversation.rounds.at(-1);
    const winner = typeof choice === "number" ? { column: choice } : choice;
    const rows = typeof choice === "number" ? pairs(conversation, round, choice) : [];
    const all = [...this.all, { models, winner, blind, at: Date.now(), rows }];
    let size = all.reduce((sum, vote) => sum + JSON.stringify(vote.rows).length, 0);
    for (const vote of all.slice(0, -1)) {
      if (size <= MOST) break;
      size -= JSON.stringify(vote.rows).length;
      vote.rows = [];
    }
    return remember(this.storage, "votes", all);
  }

  clear() {
    this.restore([]);
  }

  restore(votes) {
    remember(this.storage, "votes", votes);
  }

  /** [{model, won, lost, tied, bad}], the most often preferred first. */
  tally() {
    const counts = new Map();
    for (const { models, winner } of this.all) {
      for (const [column, model] of models.entries()) {
        const own = counts.get(model) ?? { model, won: 0, lost: 0, tied: 0, bad: 0 };
        counts.set(model, own);
        if (winner === "tie") own.tied += 1;
        else if (winner === "bad") own.bad += 1;
        else if (winner.column === column) own.won += 1;
        else own.lost += 1;
      }
    }
    const share = ({ won, lost, tied, bad }) => won / (won + lost + tied + bad);
    return [...counts.values()].sort((one, other) => share(other) - share(one));
  }

  /** {messages, chosen, rejected} for each answer that was beaten. */
  rows() {
    return this.all.flatMap((vote) => vote.rows);
  }
}

/** The winner's conversation up to the prompt, its answer, and each other answer that differs. */
function pairs(conversation, round, winner) {
  const messages = messagesFor(conversation, winner);
  const chosen = round.answers[winner].content;
  return round.answers
    .map(({ content }) => content)
    .filter((content, column) => column !== winner && content !== chosen)
    .map((rejected) => ({ messages, chosen, rejected }));
}
