// A conversation as a value: one or more models that get the same prompts, round by round.
//
// {id, title, created, updated, system, models, blind, revealed, rounds}. A chat has one model, which may
// change; a comparison has two to four, and each sees only its own answers. A round is
// {prompt, answers, vote}, its answers in the order of the models.

const TITLE = 60; // characters
export const MOST_MODELS = 4;

export function newConversation({ models, blind = false, system = "" }) {
  const now = Date.now();
  return {
    id: crypto.randomUUID?.() ?? `${now}-${Math.random()}`, // missing over plain HTTP
    title: "",
    created: now,
    updated: now,
    system,
    models: [...models],
    blind,
    revealed: false, // a vote was given, so the names are no secret any more
    rounds: [],
  };
}

export function newAnswer(model, plain) {
  return {
    model,
    plain, // continued text, shown as it is
    content: "",
    reasoning: "",
    usage: null, // the server's: prompt_tokens, completion_tokens, ...
    seconds: null, // from the first piece to the last
    waited: null, // seconds to the first piece
    finish: null, // as the server says, or "stopped"
    failure: null, // {kind, message, seconds}
  };
}

export function isComparison(conversation) {
  return conversation.models.length > 1;
}

/** Before the first prompt: the order of what is compared blindly is drawn, and told to nobody. */
export function drawOrder(conversation) {
  const { blind, rounds, models } = conversation;
  if (blind && !rounds.length) conversation.models = shuffled(models);
}

export function namesHidden({ blind, revealed }) {
  return blind && !revealed;
}

export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const first = conversation.rounds[0]?.prompt.trim().split("\n")[0] ?? "";
  if (!first) return isComparison(conversation) ? "New comparison" : "New conversation";
  return first.length > TITLE ? `${first.slice(0, TITLE).trimEnd()}…` : first;
}

/** What a model is sent: the rounds before the last, its own answers in them, the last prompt.
 * Roles take turns, as templates want it: a prompt without an answer joins the next. */
export function messagesFor(conversation, column, rounds = conversation.rounds) {
  const messages = [];
  if (conversation.system.trim()) messages.push({ role: "system", content: conversation.system });
  for (const [number, { prompt, answers }] of rounds.entries()) {
    const last = messages.at(-1);
    if (last?.role === "user") last.content += `\n\n${prompt}`;
    else messages.push({ role: "user", content: prompt });
    const content = answers[column]?.content;
    if (content && number < rounds.length - 1) messages.push({ role: "assistant", content });
  }
  return messages;
}

/** What a model without a chat template continues: everything said, one after the other. */
export function textFor(conversation, column, rounds = conversation.rounds) {
  const said = rounds.map(({ prompt, answers }, number) => {
    const own = number < rounds.length - 1 ? (answers[column]?.content ?? "") : "";
    return prompt + own;
  });
  return said.join("");
}

/** Rows to train on: one for each model's answers; whatever was not answered is left out. */
export function rowsOf(conversation) {
  return conversation.models.flatMap((_, column) => {
    const rounds = conversation.rounds.filter(({ answers }) => answers[column]?.content);
    if (!rounds.length) return [];
    const { content, plain } = rounds.at(-1).answers[column];
    if (plain) return [{ text: textFor(conversation, column, rounds) + content }];
    const messages = messagesFor(conversation, column, rounds);
    return [{ messages: [...messages, { role: "assistant", content }] }];
  });
}

/** A stored value as a conversation, null if it is none. */
export function asConversation(value) {
  const texts = ["id", "title", "system"].every((key) => typeof value?.[key] === "string");
  const fits =
    texts &&
    Number.isFinite(value.updated) &&
    Array.isArray(value.models) &&
    value.models.length > 0 &&
    value.models.every((model) => typeof model === "string") &&
    Array.isArray(value.rounds) &&
    value.rounds.every(
      ({ prompt, answers }) =>
        typeof prompt === "string" &&
        Array.isArray(answers) &&
        answers.length === value.models.length &&
        answers.every(
          (answer) => typeof answer?.content === "string" && typeof answer.reasoning === "string",
        ),
    );
  return fits ? value : null;
}

export function letter(column) {
  return "ABCD"[column];
}

function shuffled(values) {
  const mixed = [...values];
  for (let left = mixed.length; left > 1; left--) {
    const drawn = Math.floor(Math.random() * left);
    [mixed[left - 1], mixed[drawn]] = [mixed[drawn], mixed[left - 1]];
  }
  return mixed;
}
