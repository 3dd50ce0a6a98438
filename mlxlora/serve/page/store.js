// Conversations in this browser's own storage, and nowhere else. It is bounded: the oldest go
// first. One key each, so that a change writes one conversation and not all.

import { asConversation, titleOf } from "./conversation.js";

const PREFIX = "mlxlora.conversation.";
const MOST = 2_000_000; // characters of all conversations; Safari gives a page about 2.5 million

export class Store {
  /** storage is localStorage or its like. */
  constructor(storage, most = MOST) {
    this.storage = storage;
    this.most = most;
    this.known = new Map(); // id -> {id, title, updated, size}
    for (let at = 0; at < this.storage.length; at++) {
      const key = this.storage.key(at);
      if (key.startsWith(PREFIX)) this.look(key.slice(PREFIX.length));
    }
  }

  /** Newest first: {id, title, updated, size}. */
  list() {
    return [...this.known.values()].sort((one, other) => other.updated - one.updated);
  }

  /** The conversation, or null if there is none that can be read. */
  load(id) {
    try {
      return asConversation(JSON.parse(this.storage.getItem(PREFIX + id)));
    } catch {
      return null;
    }
  }

  /** Keep it. Returns [whether it is kept, how many of the oldest were dropped for it]. */
  save(conversation) {
    const text = JSON.stringify(conversation);
    const { id, updated } = conversation;
    let dropped = 0;
    while (true) {
      const others = this.list().filter((entry) => entry.id !== id);
      const taken = others.reduce((sum, entry) => sum + entry.size, 0);
      if (taken + text.length <= this.most && this.put(PREFIX + id, text)) {
        this.known.set(id, { id, title: titleOf(conversation), updated, size: text.length });
        return [true, dropped];
      }
      if (!others.length || text.length > this.most) return [false, dropped];
      this.remove(others.at(-1).id);
      dropped += 1;
    }
  }

  put(key, text) {
    try {
      this.storage.setItem(key, text);
      return true;
    } catch {
      return false; // the browser's own limit
    }
  }

  remove(id) {
    this.storage.removeItem(PREFIX + id);
    this.known.delete(id);
  }

  removeAll() {
    for (const { id } of this.list()) this.remove(id);
  }

  /** Read again what another window changed. True if that was a conversation. */
  changed(key) {
    if (!key?.startsWith(PREFIX)) return false;
    this.known.delete(key.slice(PREFIX.length));
    this.look(key.slice(PREFIX.length));
    return true;
  }

  look(id) {
    const conversation = this.load(id);
    if (!conversation) return;
    const size = this.storage.getItem(PREFIX + id).length;
    this.known.set(id, { id, title: titleOf(conversation), updated: conversation.updated, size });
  }
}

/** A small value that the page remembers; fallback if it never did, or it cannot be read. */
export function remembered(storage, name, fallback) {
  try {
    return JSON.parse(storage.getItem(`mlxlora.${name}`)) ?? fallback;
  } catch {
    return fallback;
  }
}

/** False if the browser would not keep it. */
export function remember(storage, name, value) {
  try {
    storage.setItem(`mlxlora.${name}`, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

/** localStorage; where the browser forbids it, what lasts as long as the page. */
export function browserStorage() {
  try {
    return window.localStorage;
  } catch {
    return memory();
  }
}

function memory() {
  const kept = new Map();
  return {
    get length() {
      return kept.size;
    },
    key: (at) => [...kept.keys()][at],
    getItem: (key) => kept.get(key) ?? null,
    setItem: (key, text) => kept.set(key, text),
    removeItem: (key) => kept.delete(key),
  };
}
