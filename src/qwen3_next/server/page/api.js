// Talks with the server that this page came from: which model it serves, and answers while they are written.

const UNREACHABLE = "The server cannot be reached. Is it running?";
const BROKEN = "The answer broke off: the connection ended before it was complete.";

/** An answer that did not come, or not all of it; `status` is that of HTTP, 0 without one. */
export class Refusal extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export async function modelName(key) {
  const response = await ask("/v1/models", { headers: headersOf(key) });
  return (await response.json()).data[0].id;
}

/** Yields the choices of a streamed chat completion as they come. */
export async function* streamed(body, key, signal) {
  const headers = { ...headersOf(key), "Content-Type": "application/json" };
  const response = await ask("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  for await (const data of eventsOf(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refusal(`The answer broke off: ${chunk.error.message}`);
    yield* chunk.choices;
  }
  throw new Refusal(BROKEN);
}

function headersOf(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function ask(path, options) {
  const response = await fetch(path, options).catch((error) => {
    throw error.name === "AbortError" ? error : new Refusal(UNREACHABLE);
  });
  if (response.ok) return response;
  const text = await response.text().catch(() => "Its reason did not arrive.");
  throw new Refusal(explained(response, text), response.status);
}

function explained(response, text) {
  const wait = Number(response.headers.get("Retry-After"));
  const before = { 429: "Too many requests are waiting (429). ", 503: "The server takes no requests now (503). " };
  const after = wait ? ` Try again in ${wait} ${wait === 1 ? "second" : "seconds"}.` : "";
  return (before[response.status] ?? `The server refused this (${response.status}). `) + messageOf(text) + after;
}

/** What the server says, in its own shape or in that of a proxy before it. */
function messageOf(text) {
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text.slice(0, 300);
  }
}

/** The data of server-sent events. */
async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const events = (held + value).split("\n\n");
      held = events.pop();
      for (const event of events) yield event.replace(/^data: /, "");
    }
  } catch (error) {
    throw error.name === "TypeError" ? new Refusal(BROKEN) : error;
  } finally {
    reader.cancel().catch(() => {}); // it may be broken already
  }
}
