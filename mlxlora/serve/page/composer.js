// Where one writes: a field that grows with its text, and a button that sends or stops.

import { icon } from "./dom.js";

export class Composer {
  /** send(text) returns whether it was taken; stop(); editLast() answers the arrow up. */
  constructor({ send, stop, editLast }) {
    this.field = document.getElementById("message");
    this.button = document.getElementById("send");
    this.running = false;
    this.actions = { send, stop };
    document.getElementById("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.running) stop();
      else this.send();
    });
    this.field.addEventListener("input", () => this.fit());
    this.field.addEventListener("keydown", (event) => {
      if (event.isComposing) return; // Enter ends a word of an input method
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        if (!this.running) this.send();
      } else if (event.key === "ArrowUp" && !this.field.value) {
        event.preventDefault();
        editLast();
      }
    });
    this.setRunning(false);
  }

  send() {
    const text = this.field.value;
    if (!text.trim() || !this.actions.send(text)) return;
    this.field.value = "";
    this.fit();
  }

  setRunning(running) {
    this.running = running;
    this.button.setAttribute("aria-label", running ? "Stop" : "Send");
    this.button.title = running ? "Stop (Esc)" : "Send (Enter)";
    this.button.replaceChildren(icon(running ? "stop" : "arrow"));
    this.fit();
  }

  fit() {
    this.field.style.height = "auto";
    this.field.style.height = `${this.field.scrollHeight}px`;
    this.button.disabled = !this.running && !this.field.value.trim();
  }

  focus() {
    this.field.focus();
  }
}
