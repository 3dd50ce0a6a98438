// One answer as it is shown: reasoning folded, text, what went wrong, and what it took.

import { copyWith, element, iconButton, textButton } from "./dom.js";
import { Prose } from "./prose.js";

const SHORTEST = 0.05; // seconds that tell how fast an answer was
const SHARE = 4; // times as long is waited as the last change took to show

export class AnswerView {
  /** name: whose answer this is, or a letter. again is called to have it once more, null where
   * that makes no sense. resized is called when it has grown. */
  constructor(answer, { name, running = false, again = null, resized = () => {} }) {
    this.answer = answer;
    this.resized = resized;
    this.again = again;
    this.running = running;
    this.next = 0; // milliseconds: the earliest time of the next change
    this.waiting = false;

    this.name = element("header", { class: "name" }, element("bdi", {}, name));
    this.reasoned = element("div", { class: "prose" });
    this.summary = element("summary", {}, "Reasoning");
    this.reasoning = element(
      "details",
      { class: "reasoning", hidden: true, ontoggle: () => this.show() },
      this.summary,
      this.reasoned,
    );
    this.text = element("div", { class: answer.plain ? "prose plain" : "prose" });
    this.pulse = element("span", { class: "pulse", role: "img", "aria-label": "Waiting" });
    this.failure = element("div", { class: "failure", role: "alert", hidden: true });
    this.facts = element("footer", { class: "facts" });
    this.element = element(
      "article",
      { class: "answer", "aria-label": `Answer of ${name}` },
      this.name,
      this.reasoning,
      this.text,
      this.pulse,
      this.failure,
      this.facts,
    );
    this.prose = new Prose(this.text, { markdown: !answer.plain });
    this.thoughts = new Prose(this.reasoned);
    this.show();
    if (!running) this.end();
    else this.element.setAttribute("aria-busy", "true");
  }

  rename(name) {
    this.name.replaceChildren(element("bdi", {}, name));
    this.element.setAttribute("aria-label", `Answer of ${name}`);
  }

  /** The answer has grown: show that soon, but spend little of the time on it. */
  grow() {
    if (this.waiting) return;
    this.waiting = true;
    const frame = (now) => {
      if (now < this.next && this.running) {
        requestAnimationFrame(frame);
        return;
      }
      this.waiting = false;
      if (!this.running) return; // shown whole already
      const began = performance.now();
      this.show();
      this.resized(); // asks for the layout, so its time counts
      const ended = performance.now();
      this.next = ended + SHARE * (ended - began);
    };
    requestAnimationFrame(frame);
  }

  show() {
    const { content, reasoning } = this.answer;
    this.pulse.hidden = !this.running || Boolean(content);
    this.reasoning.hidden = !reasoning;
    if (reasoning) {
      this.summary.textContent = this.running && !content ? "Reasoning…" : "Reasoning";
      if (this.reasoning.open) this.thoughts.show(reasoning);
    }
    this.prose.show(content);
  }

  end() {
    this.running = false;
    this.show();
    this.element.removeAttribute("aria-busy");
    this.showFailure();
    this.showFacts();
    this.resized();
  }

  setAgain(again) {
    this.again = again;
    if (!this.running) {
      this.showFailure();
      this.showFacts();
    }
  }

  showFailure() {
    const { failure } = this.answer;
    this.failure.hidden = !failure;
    if (!failure) return;
    const action =
      this.again && failure.kind !== "length"
        ? textButton("Try again", this.again, { class: "small" })
        : null;
    this.failure.replaceChildren(
      ...[element("p", {}, ...told(failure).map((part) => element("span", {}, part))), action].filter(
        Boolean,
      ),
    );
  }

  showFacts() {
    const { content, failure } = this.answer;
    const parts = facts(this.answer);
    const buttons = [];
    if (content) {
      const button = iconButton("copy", "Copy answer", () => copyWith(button, content));
      buttons.push(button);
    }
    if (this.again && !failure) buttons.push(iconButton("redo", "Regenerate", this.again));
    this.facts.replaceChildren(
      element("span", { class: "buttons" }, ...buttons),
      element("span", { class: "numbers", title: more(this.answer) }, parts.join(" · ")),
    );
  }
}

/** What a failure means, and what may be done about it. */
function told({ kind, message, seconds }) {
  if (kind === "busy") {
    const wait = seconds ? ` It asks to wait ${seconds} ${seconds === 1 ? "second" : "seconds"}.` : "";
    return [`The server has too much to do just now.${wait}`];
  }
  if (kind === "key") return ["This server wants an API key. Enter it below."];
  if (kind === "length") {
    return [
      "This is more than the model can read. Edit an earlier message, lower the max tokens in " +
        "the settings, or start a new conversation.",
      ` The server says: ${message}`,
    ];
  }
  return [kind === "cut" ? `The answer broke off: ${message}` : message];
}

function facts({ usage, seconds, finish, failure, content }) {
  const parts = [];
  const tokens = usage?.completion_tokens;
  if (Number.isFinite(tokens)) {
    parts.push(`${tokens.toLocaleString("en")} ${tokens === 1 ? "token" : "tokens"}`);
    if (tokens > 1 && seconds > SHORTEST) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tok/s`);
  }
  if (finish === "length") parts.push("ended at the max tokens");
  if (finish === "stopped" || (!finish && !failure)) parts.push("stopped");
  if (finish && finish !== "stopped" && !content && !failure) parts.push("the answer is empty");
  return parts;
}

function more({ usage, waited }) {
  const parts = [];
  if (Number.isFinite(usage?.prompt_tokens)) parts.push(`${usage.prompt_tokens} tokens read`);
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  if (cached) parts.push(`${cached} of them known from before`);
  if (waited !== null && waited !== undefined) parts.push(`first token after ${waited.toFixed(2)} s`);
  return parts.join(", ");
}
