/** The server's side: OpenAI's images API. Addresses are relative, so the page works below a prefix too. */

const MODELS = "v1/models";
const GENERATIONS = "v1/images/generations";

/** What went wrong, in words for the person at the page. */
export class Problem extends Error {
  /**
   * @param {string} message one or two sentences
   * @param {{field?: string | null, needsKey?: boolean}} more the request's field that is wrong; whether an API key would help
   */
  constructor(message, { field = null, needsKey = false } = {}) {
    super(message);
    this.name = "Problem";
    this.field = field;
    this.needsKey = needsKey;
  }
}

/** The models that the server has; the first is its default. */
export async function fetchModels(key, signal) {
  const response = await ask(MODELS, { headers: authorization(key), signal });
  const body = await response.json().catch(() => null);
  return Array.isArray(body?.data) ? body.data : [];
}

/** Draws a picture: gives each partial image, then the finished one, as the server's events have them. */
export async function* draw(body, key, signal) {
  const headers = { ...authorization(key), "content-type": "application/json", accept: "text/event-stream" };
  const response = await ask(GENERATIONS, { method: "POST", headers, body: JSON.stringify(body), signal });
  for await (const event of eventsOf(response.body)) {
    if (event.type === "error" || event.error) {
      throw new Problem(sentence(event.error?.message ?? "the server failed while it drew"), { field: event.error?.param });
    }
    yield event;
    if (event.type?.endsWith(".completed")) {
      return;
    }
  }
  throw new Problem("The server ended its answer before the picture was finished. Draw again.");
}

function authorization(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

/** A response that is no error. */
async function ask(address, options) {
  let response;
  try {
    response = await fetch(address, { cache: "no-store", ...options });
  } catch (error) {
    throw isAbort(error) ? error : new Problem("The server cannot be reached. Check that it runs, then draw again.");
  }
  if (!response.ok) {
    throw await problemOf(response);
  }
  return response;
}

export function isAbort(error) {
  return error?.name === "AbortError";
}

async function problemOf(response) {
  const body = await response.json().catch(() => null);
  const message = sentence(body?.error?.message ?? "");
  const field = body?.error?.param ?? null;
  switch (response.status) {
    case 401:
      return new Problem("This server needs an API key that it knows. Enter it here.", { needsKey: true });
    case 429:
    case 503:
      return new Problem([message || "The server takes no request now.", again(response)].join(" "));
    default:
      return new Problem(message || `The server answered with status ${response.status} and no reason.`, { field });
  }
}

/** When to try again, by the header Retry-After, which is a number of seconds or a date. */
function again(response) {
  const header = response.headers.get("retry-after") ?? "";
  const seconds = /^\d+$/.test(header) ? Number(header) : Math.ceil((Date.parse(header) - Date.now()) / 1000);
  if (!(seconds > 0)) {
    return "Try again.";
  }
  return `Try again in ${seconds} ${seconds === 1 ? "second" : "seconds"}.`;
}

function sentence(text) {
  const trimmed = String(text).trim();
  if (!trimmed) {
    return "";
  }
  const capital = trimmed[0].toUpperCase() + trimmed.slice(1);
  return /[.!?]$/.test(capital) ? capital : `${capital}.`;
}

/** The events of a stream whose data is JSON; their name stands in for a type that the data lacks. */
async function* eventsOf(stream) {
  for await (const block of blocksOf(stream)) {
    const lines = block.split(/\r\n|\r|\n/);
    const data = fieldOf(lines, "data");
    const parsed = data ? parse(data) : null;
    if (parsed) {
      yield { type: fieldOf(lines, "event"), ...parsed };
    }
  }
}

function parse(data) {
  if (data === "[DONE]") {
    return null;
  }
  try {
    return JSON.parse(data);
  } catch {
    throw new Problem("The server sent an event that is no JSON.");
  }
}

function fieldOf(lines, name) {
  const found = lines.filter((line) => line.startsWith(`${name}:`));
  return found.map((line) => line.slice(name.length + 1).replace(/^ /, "")).join("\n");
}

/** The parts of a stream between empty lines. */
async function* blocksOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch(lost);
      rest += value ?? "";
      const blocks = rest.split(/\r\n\r\n|\n\n|\r\r/);
      rest = blocks.pop();
      yield* blocks;
      if (done) {
        return;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function lost(error) {
  throw isAbort(error) ? error : new Problem("The connection broke while the server drew. Draw again.");
}
