// What this browser keeps: conversations, settings and the key. Nothing of it goes anywhere but into requests.

const NAME = "qwen3-next";

/** Everything that was kept, or a fresh beginning. */
export function load() {
  const fresh = { conversations: [], current: "", settings: {}, key: "", theme: "system", marks: true };
  try {
    return { ...fresh, ...JSON.parse(localStorage.getItem(NAME) ?? "{}") };
  } catch (error) {
    console.warn("what was kept here cannot be read, and is replaced:", error);
    return fresh;
  }
}

/** Keeps it. False: the browser has no room. */
export function save(state) {
  try {
    localStorage.setItem(NAME, JSON.stringify(state));
    return true;
  } catch (error) {
    if (error.name === "QuotaExceededError") return false;
    throw error;
  }
}

/** Calls back when another tab has kept something. */
export function onChange(callback) {
  addEventListener("storage", (event) => event.key === NAME && callback());
}

export function newConversation() {
  return { id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, system: "", messages: [] };
}

export function newAnswer() {
  return { role: "assistant", pieces: [], reasoning: "", tokens: 0, accepted: 0, rejected: 0, timed: 0, seconds: 0, end: "" };
}

/** A message's text; pieces are pairs of a text and whether drafts brought it. */
export function textOf(message) {
  return message.pieces.map(([text]) => text).join("");
}

export function titleOf(conversation) {
  return conversation.messages.length ? textOf(conversation.messages[0]).slice(0, 60) : "New conversation";
}

/** The messages as the server wants them. */
export function promptOf(conversation) {
  const system = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  return [...system, ...conversation.messages.map((one) => ({ role: one.role, content: textOf(one) }))];
}

/** Takes a piece of a stream into an answer. Times begin with the first token, which waits for the prompt. */
export function take(answer, choice, now) {
  const { tokens, accepted, rejected } = choice.drafts ?? { tokens: 0, accepted: 0, rejected: 0 };
  if (answer.tokens) {
    answer.timed += tokens;
    answer.seconds = (now - answer.begun) / 1000;
  } else if (tokens) {
    answer.begun = now;
  }
  answer.tokens += tokens;
  answer.accepted += accepted;
  answer.rejected += rejected;
  answer.reasoning += choice.delta.reasoning_content ?? "";
  if (choice.delta.content) answer.pieces.push([choice.delta.content, accepted > 0]);
  answer.end = choice.finish_reason ?? answer.end;
}
