// The page: its parts are made here and told of each other.

import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { isComparison, namesHidden, rowsOf } from "./conversation.js";
import { copyWith, download, element, icon, textButton, toast } from "./dom.js";
import { Picker, shortName } from "./picker.js";
import { Failure, Server } from "./server.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Store, browserStorage, remember, remembered } from "./store.js";
import { Tally } from "./tally.js";
import { Votes } from "./votes.js";

const byId = (id) => document.getElementById(id);
const storage = browserStorage();
const server = new Server();
const store = new Store(storage);
const votes = new Votes(storage);
const tally = new Tally(votes);
let models = [];

const settings = new Settings(storage, {
  changed: () => {
    chat.conversation.system = settings.system;
    showSettings();
  },
});
const chat = new Chat({
  server,
  store,
  votes,
  modelOf: (id) => models.find((model) => model.id === id) ?? { id },
  sampling: () => settings.sampling,
  changed: () => showAll(),
  failed: (failure) => {
    if (failure.kind === "key") askForKey();
  },
});
const picker = new Picker({
  changed: (picked) => {
    chat.conversation.models = picked;
    remember(storage, isComparison(chat.conversation) ? "compared" : "model", picked);
    showAll();
  },
  blinded: (blind) => {
    remember(storage, "blind", blind);
    chat.begin(chat.conversation.models, { blind, system: settings.system });
  },
});
const sidebar = new Sidebar({
  open: (id) => {
    if (!chat.open(id)) toast("This conversation cannot be read any more.");
    settings.setSystem(chat.conversation.system);
    composer.focus();
  },
  rename: (id, title) => {
    const conversation = chat.find(id);
    if (title && conversation) {
      conversation.title = title;
      store.save(conversation);
    }
    showList();
  },
  remove,
});
const composer = new Composer({
  send: (text) => models.length > 0 && chat.send(text),
  stop: () => chat.stop(),
  editLast: () => chat.editLast(),
});

/** Models that are served now, of those that were picked before; others where there are none. */
function pick(name, count) {
  const served = models.map(({ id }) => id);
  const before = remembered(storage, name, []);
  const kept = Array.isArray(before) ? before.filter((id) => served.includes(id)) : [];
  // the tuned model first: it is what one came to talk to
  const adapters = models.filter(({ parent }) => parent).map(({ id }) => id);
  const fresh = [...adapters.slice(0, 1), ...served, ...adapters].filter((id) => !kept.includes(id));
  while (kept.length < count) kept.push(fresh.shift() ?? served[0] ?? "");
  return count === 1 ? kept.slice(0, 1) : kept;
}

function beginChat() {
  chat.begin(pick("model", 1), { system: settings.system });
  ready();
}

function beginComparison() {
  const blind = remembered(storage, "blind", false) === true;
  chat.begin(pick("compared", 2), { blind, system: settings.system });
  ready();
}

function ready() {
  sidebar.toggle(false);
  composer.focus();
}

function showAll() {
  const { conversation } = chat;
  picker.show(conversation, models);
  composer.setRunning(chat.answering.length > 0);
  byId("compare").setAttribute("aria-pressed", String(isComparison(conversation)));
  document.body.classList.toggle("comparing", isComparison(conversation));
  document.body.classList.toggle("empty", !conversation.rounds.length);
  const { id } = conversation;
  history.replaceState(null, "", store.known.has(id) ? `#${id}` : location.pathname);
  showGreeting();
  showPlain();
  showSettings();
  showList();
}

function showList() {
  sidebar.show(store.list(), chat.conversation.id);
}

function showSettings() {
  byId("adjust").classList.toggle("changed", !settings.isDefault);
}

function showGreeting() {
  const { conversation } = chat;
  const [first] = conversation.models;
  const heading = isComparison(conversation)
    ? `One prompt, ${["two", "three", "four"][conversation.models.length - 2]} answers`
    : first
      ? `Talk to ${shortName(first)}`
      : "No model yet";
  byId("greeting").replaceChildren(
    element("h1", {}, element("bdi", {}, heading)),
    element("p", {}, "Everything stays between this browser and your server."),
  );
}

/** A model without a chat template is continued, which should surprise nobody. */
function showPlain() {
  const { conversation } = chat;
  const without = conversation.models.filter((id) => {
    const model = models.find((one) => one.id === id);
    return model?.capabilities && !model.capabilities.includes("chat");
  });
  byId("plain").hidden = !without.length;
  const names = namesHidden(conversation) ? "One of these models" : without.map(shortName).join(", ");
  byId("plain").textContent =
    `${names} cannot chat (there is no chat template): your text is continued as plain text, ` +
    "and the system prompt is left out.";
}

function remove(id) {
  const conversation = chat.find(id);
  chat.drop(id);
  if (id === chat.conversation.id) beginChat();
  showList();
  const undo = () => {
    store.save(conversation);
    showList();
  };
  toast("The conversation is deleted.", conversation && { label: "Undo", run: undo });
}

function removeAll() {
  const dialog = byId("confirm");
  const drop = () => {
    dialog.close();
    for (const { id } of store.list()) chat.drop(id);
    beginChat();
  };
  dialog.replaceChildren(
    element("h2", {}, "Delete all conversations?"),
    element("p", {}, "They are only in this browser, so they cannot be had back. Votes are kept."),
    element(
      "div",
      { class: "row" },
      textButton("Cancel", () => dialog.close()),
      textButton("Delete all", drop, { class: "danger" }),
    ),
  );
  dialog.showModal();
}

function exportAll() {
  const kept = store.list().map(({ id }) => store.load(id));
  const rows = kept.filter(Boolean).flatMap(rowsOf);
  if (rows.length) download("conversations.jsonl", rows.map((row) => JSON.stringify(row)));
  else toast("There is no answered conversation to export.");
}

/** Ask the server what it serves; say so where it does not answer. */
async function load() {
  try {
    models = await server.models();
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    if (error.kind === "key") askForKey();
    else showNotice(error.message);
    return false;
  }
  byId("notice").hidden = true;
  byId("key").hidden = true;
  const { conversation } = chat;
  if (!conversation.rounds.length && conversation.models.some((id) => !id)) {
    conversation.models = pick("model", 1);
  }
  showAll();
  return true;
}

function showNotice(text) {
  byId("notice").hidden = false;
  byId("notice").replaceChildren(
    element("span", {}, text),
    textButton("Try again", load, { class: "small" }),
  );
}

function askForKey() {
  const form = byId("key");
  const wrong = server.key ? "The server does not take this key." : "This server wants its API key.";
  byId("key-label").textContent = wrong;
  if (!form.hidden) return;
  form.hidden = false;
  byId("notice").hidden = true;
  byId("key-field").focus();
}

byId("key").addEventListener("submit", async (event) => {
  event.preventDefault();
  server.setKey(byId("key-field").value.trim());
  if (!(await load())) return;
  byId("key-field").value = "";
  chat.retry("key");
  composer.focus();
});

byId("new").addEventListener("click", beginChat);
byId("compare").addEventListener("click", () =>
  isComparison(chat.conversation) ? beginChat() : beginComparison(),
);
byId("adjust").addEventListener("click", () => {
  const lengths = chat.conversation.models.map((id) => chat.modelOf(id).max_model_len);
  settings.open(Math.min(...lengths.filter(Number.isFinite), Infinity));
});
byId("votes").addEventListener("click", () => tally.open());
byId("export").addEventListener("click", exportAll);
byId("delete-all").addEventListener("click", removeAll);
byId("theme").addEventListener("click", () => {
  const systems = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const now = document.documentElement.dataset.theme ?? systems;
  const other = now === "dark" ? "light" : "dark";
  if (other === systems) delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = other;
  try {
    if (other === systems) storage.removeItem("mlxlora.theme");
    else storage.setItem("mlxlora.theme", other);
  } catch {
    toast("The browser does not let the page remember this.");
  }
});
byId("rounds").addEventListener("click", (event) => {
  const button = event.target.closest("[data-copy]");
  if (button) copyWith(button, button.closest("figure").querySelector("pre").textContent);
});

addEventListener("keydown", (event) => {
  const inDialog = document.querySelector("dialog[open]") !== null;
  const writing = event.target.closest?.("input, textarea, select, [contenteditable]");
  if ((event.metaKey || event.ctrlKey) && event.key.toLowerCase() === "k") {
    event.preventDefault();
    if (!inDialog) beginChat();
  } else if (event.key === "Escape" && !inDialog) {
    if (sidebar.isOpen && byId("shade").offsetParent) sidebar.toggle(false);
    else chat.stop();
  } else if (event.key === "/" && !writing && !inDialog) {
    event.preventDefault();
    composer.focus();
  }
});
addEventListener("storage", (event) => {
  if (store.changed(event.key)) showList();
});
addEventListener("pagehide", () => chat.leave());
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && models.length) load(); // adapters may have been loaded meanwhile
});

for (const button of document.querySelectorAll("[data-icon]")) {
  button.prepend(icon(button.dataset.icon));
}
if (!location.hash || !chat.open(location.hash.slice(1))) {
  chat.begin([""], { system: settings.system });
} else settings.setSystem(chat.conversation.system);
load();
if (matchMedia("(hover: hover)").matches) composer.focus();
