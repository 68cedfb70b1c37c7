// The page: what its buttons and keys do. One answer is written at a time.

import { modelName, streamed } from "./api.js";
import * as store from "./store.js";
import { Article, make } from "./view.js";

const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];
const THEMES = ["system", "light", "dark"];
const $ = (id) => document.getElementById(id);

let state = store.load();
let conversation; // the one that is shown
let articles = []; // of its messages
let model = "";
let stopping = null; // the AbortController of the answer that is being written
let editing = -1; // the place of the message that is being edited

function keep() {
  if (!store.save(state)) complain("This browser has no room left to keep the conversation. Delete an older one.");
}

function show(id) {
  stopping?.abort();
  conversation = state.conversations.find((one) => one.id === id) ?? state.conversations[0];
  if (!conversation) {
    conversation = store.newConversation();
    state.conversations.unshift(conversation);
  }
  state.current = conversation.id;
  $("system").value = conversation.system;
  $("problem").hidden = true;
  edit(-1);
  drawMessages();
  drawConversations();
}

function drawMessages() {
  articles = conversation.messages.map((message) => new Article(message));
  for (const article of articles) article.writer.end();
  $("messages").replaceChildren(...articles.map((article) => article.element));
  $("messages").scrollTop = $("messages").scrollHeight;
  drawActions();
}

/** The last question can be edited, and the last answer written anew, while none is being written. */
function drawActions() {
  for (const article of articles) article.actions = [];
  if (stopping) return;
  const asked = conversation.messages.findLastIndex((message) => message.role === "user");
  if (asked < 0) return;
  articles[asked].actions = [make("button", { type: "button", text: "Edit", onclick: () => edit(asked) })];
  if (asked + 1 < articles.length) {
    articles.at(-1).actions = [make("button", { type: "button", text: "Regenerate", onclick: regenerate })];
  }
}

function drawConversations() {
  const items = state.conversations.map((one) => {
    const title = store.titleOf(one);
    const open = make("button", { type: "button", text: title, onclick: () => (show(one.id), keep(), $("text").focus()) });
    if (one === conversation) open.ariaCurrent = "true";
    const remove = make("button", { type: "button", text: "✕", ariaLabel: `Delete: ${title}`, onclick: () => forget(one) });
    return make("li", {}, open, remove);
  });
  $("conversations").replaceChildren(...items);
}

function forget(one) {
  if (!confirm(`Delete "${store.titleOf(one)}"?`)) return;
  state.conversations = state.conversations.filter((other) => other !== one);
  show(one === conversation ? "" : conversation.id);
  keep();
  $("new").focus();
}

function begin() {
  if (!conversation.messages.length) return; // it is new already
  const made = store.newConversation();
  state.conversations.unshift(made);
  show(made.id);
  keep();
}

/** Puts a message back into the field; -1: none any more. */
function edit(place) {
  if (editing !== place) $("text").value = place < 0 ? "" : store.textOf(conversation.messages[place]);
  editing = place;
  $("text-label").textContent = place < 0 ? "Message" : "Edit message";
  $("cancel").hidden = place < 0;
  if (place >= 0) $("text").focus();
}

function send() {
  const text = $("text").value;
  if (stopping || !text.trim()) return;
  if (editing >= 0) conversation.messages.length = editing;
  conversation.messages.push({ role: "user", pieces: [[text, false]] });
  $("text").value = "";
  edit(-1);
  drawMessages();
  drawConversations();
  answer();
}

function regenerate() {
  if (conversation.messages.at(-1)?.role === "assistant") conversation.messages.pop();
  drawMessages();
  $("text").focus();
  answer();
}

/** Lets the model answer the last message. */
async function answer() {
  const [own, message] = [conversation, store.newAnswer()];
  const article = new Article(message);
  const abort = (stopping = new AbortController());
  articles.push(article);
  $("messages").append(article.element);
  article.busy = true;
  setBusy(true, "The model answers.");
  keep();
  try {
    model ||= await modelName(state.key);
    const prompt = store.promptOf(own);
    own.messages.push(message);
    for await (const choice of streamed(bodyOf(prompt), state.key, abort.signal)) follow(article, message, choice);
    $("status").textContent = "The answer is complete.";
  } catch (error) {
    if (error.name === "AbortError") message.end = "stopped";
    explain(error);
  } finally {
    delete message.begun;
    if (stopping === abort) stopping = null;
    end(own, message, article);
  }
}

function bodyOf(messages) {
  const given = SAMPLING.filter((name) => state.settings[name]).map((name) => [name, Number(state.settings[name])]);
  return { model, messages, stream: true, stream_options: { include_drafts: true }, ...Object.fromEntries(given) };
}

function follow(article, message, choice) {
  const log = $("messages");
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  store.take(message, choice, performance.now());
  article.think(choice.delta.reasoning_content);
  if (choice.delta.content) article.writer.write(...message.pieces.at(-1));
  article.figures(message);
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

/** What came is kept, also of an answer that was stopped or broke off. */
function end(own, message, article) {
  article.busy = false;
  article.figures(message);
  if (!message.tokens) {
    own.messages = own.messages.filter((one) => one !== message);
    articles = articles.filter((one) => one !== article);
    article.element.remove();
  }
  if (!stopping) setBusy(false);
  drawActions();
  keep();
}

function setBusy(isBusy, status) {
  if (isBusy) $("problem").hidden = true;
  if (!isBusy && document.activeElement === $("stop")) $("text").focus();
  $("stop").hidden = !isBusy;
  $("send").hidden = isBusy;
  if (status) $("status").textContent = status;
  drawActions();
}

function explain(error) {
  if (error.name === "AbortError") $("status").textContent = "Stopped.";
  else if (error.status === 401) askForKey();
  else if (error.status !== undefined) complain(error.message, true);
  else throw error;
}

function complain(text, mayTryAgain = false) {
  $("problem-text").textContent = text;
  $("again").hidden = !mayTryAgain;
  $("problem").hidden = false;
}

function askForKey() {
  $("key-form").hidden = false;
  complain(state.key ? "The server does not accept this API key." : "The server needs an API key.");
  $("key").focus();
}

async function connect() {
  try {
    model = await modelName(state.key);
    $("model").textContent = model;
    $("key-form").hidden = true;
    $("problem").hidden = true;
    return true;
  } catch (error) {
    explain(error);
    return false;
  }
}

async function useKey() {
  state.key = $("key").value.trim();
  keep();
  if (!(await connect())) return;
  $("text").focus();
  if (conversation.messages.at(-1)?.role === "user") answer();
}

function setTheme(theme) {
  state.theme = document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
}

function setMarks(areShown) {
  state.marks = $("show-drafts").checked = areShown;
  $("messages").dataset.drafts = areShown ? "shown" : "hidden";
}

function onSubmit(id, action) {
  $(id).addEventListener("submit", (event) => {
    event.preventDefault();
    action();
  });
}

function onKey(event) {
  if (event.key === "Escape" && stopping) stopping.abort();
  else if (event.key === "Escape" && editing >= 0) edit(-1);
  else if (event.key === "Enter" && event.target === $("text") && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
}

function listen() {
  document.addEventListener("keydown", onKey);
  onSubmit("composer", send);
  onSubmit("key-form", useKey);
  $("stop").addEventListener("click", () => stopping?.abort());
  $("again").addEventListener("click", regenerate);
  $("cancel").addEventListener("click", () => (edit(-1), $("text").focus()));
  $("new").addEventListener("click", () => (begin(), $("text").focus()));
  $("system").addEventListener("change", () => ((conversation.system = $("system").value), keep()));
  $("theme").addEventListener("click", () => (setTheme(THEMES[(THEMES.indexOf(state.theme) + 1) % 3]), keep()));
  $("show-drafts").addEventListener("change", () => (setMarks($("show-drafts").checked), keep()));
  for (const name of SAMPLING) {
    $(name).value = state.settings[name] ?? "";
    $(name).addEventListener("change", () => ((state.settings[name] = $(name).value), keep()));
  }
  addEventListener("pagehide", keep);
  store.onChange(() => {
    if (stopping) return;
    state = { ...store.load(), current: state.current };
    show(state.current);
  });
}

$("key").value = state.key;
$("settings").open = matchMedia("(min-width: 60rem)").matches;
setTheme(state.theme);
setMarks(state.marks);
show(state.current);
listen();
connect();
