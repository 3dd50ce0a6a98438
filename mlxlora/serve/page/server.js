// The server as the page sees it: which models there are, and answers as they come.

/** What went wrong. kind: "key" (401), "busy" (429), "length" (too long for the model), "gone" (no
 * answer at all), "cut" (the answer broke off), "refused" (anything else the server said). */
export class Failure extends Error {
  constructor(kind, message, seconds = null) {
    super(message);
    this.kind = kind;
    this.seconds = seconds; // after which asking again makes sense
  }
}

const GONE = "The server does not answer. Is it still running?";
const CUT = "the connection was lost";

export class Server {
  constructor() {
    this.key = read("mlxlora.key");
  }

  setKey(key) {
    this.key = key;
    try {
      sessionStorage.setItem("mlxlora.key", key);
    } catch {
      // then it is asked for again after a reload
    }
  }

  /** [{id, parent, max_model_len, capabilities}], the base first. Raises Failure. */
  async models() {
    const response = await this.fetch("/v1/models", {});
    const { data } = await response.json().catch(() => ({}));
    if (!Array.isArray(data)) throw new Failure("refused", "The server's list of models is broken.");
    return data.filter((model) => typeof model?.id === "string");
  }

  /** The pieces of an answer: {text, reasoning, finish, usage}, each null where it says nothing.
   * path: "chat/completions" or "completions". Raises Failure; AbortError once signal says so. */
  async *answer(path, request, signal) {
    const body = { ...request, stream: true, stream_options: { include_usage: true } };
    const response = await this.fetch(`/v1/${path}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
    for await (const data of events(response.body, signal)) {
      if (data === "[DONE]") return;
      yield piece(data);
    }
    throw new Failure("cut", CUT);
  }

  async fetch(path, options) {
    const headers = { ...options.headers };
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure("gone", GONE);
    }
    if (!response.ok) throw await refusal(response);
    return response;
  }
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const error = body?.error ?? {};
  const said = typeof error.message === "string" ? error.message : "";
  const { status } = response;
  if (status === 401) return new Failure("key", said || "The server wants its API key.");
  if (status === 429) {
    const seconds = parseInt(response.headers.get("Retry-After"), 10);
    return new Failure("busy", said, Number.isNaN(seconds) ? null : seconds);
  }
  if (error.code === "context_length_exceeded") return new Failure("length", said);
  return new Failure("refused", said || `The server answered with status ${status}.`);
}

function piece(data) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new Failure("cut", "what the server sent cannot be read");
  }
  if (chunk?.error) {
    throw new Failure("cut", String(chunk.error.message ?? "the server could not go on"));
  }
  const choice = chunk?.choices?.[0];
  const delta = choice?.delta ?? {};
  return {
    text: words(choice?.text ?? delta.content),
    reasoning: words(delta.reasoning ?? delta.reasoning_content),
    finish: choice?.finish_reason ?? null,
    usage: chunk?.usage ?? null,
  };
}

function words(value) {
  return typeof value === "string" && value ? value : null;
}

/** The data of server-sent events. */
async function* events(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((one) => one.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (!line && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } catch (error) {
    if (signal.aborted || error instanceof Failure) throw error;
    throw new Failure("cut", CUT);
  } finally {
    reader.cancel().catch(() => {});
  }
}

function read(name) {
  try {
    return sessionStorage.getItem(name) ?? "";
  } catch {
    return "";
  }
}
