// Puts messages on the page. Whatever a model or a user wrote becomes text nodes, never markup.

export function make(name, { text = "", ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...(text ? [text] : []), ...children);
  return element;
}

/** One message. `add` and `figures` follow an answer while it is written. */
export class Article {
  constructor(message) {
    const isUser = message.role === "user";
    this.body = make("div", { className: "body" });
    this.note = make("p", { className: "figures", ariaLive: "off" });
    this.element = make("article", { className: message.role }, make("h2", { text: isUser ? "You" : "Model" }));
    this.element.append(this.body, ...(isUser ? [] : [this.note]));
    this.writer = new Writer(this.body);
    this.think(message.reasoning);
    for (const [text, isDraft] of message.pieces) this.writer.write(text, isDraft);
    if (!isUser) this.figures(message);
  }

  /** Adds what a model thought before it answered. */
  think(text) {
    if (!text) return;
    if (!this.thoughts) {
      this.thoughts = make("div", { className: "text" });
      this.body.before(make("details", { className: "reasoning" }, make("summary", { text: "Reasoning" }), this.thoughts));
    }
    this.thoughts.append(text);
  }

  figures(message) {
    const { tokens, accepted, rejected, timed, seconds, end } = message;
    const tried = accepted + rejected;
    const parts = [`${tokens} tokens`];
    if (timed) parts.push(`${(timed / seconds).toFixed(1)} tokens/s`);
    parts.push(tried ? `${accepted} of ${tried} drafts accepted (${Math.round((100 * accepted) / tried)} %)` : "no drafts");
    if (end === "length") parts.push("ended by its length");
    if (end === "stopped") parts.push("stopped");
    this.note.textContent = parts.join(" · ");
  }

  set busy(value) {
    this.element.ariaBusy = String(value);
    if (!value) this.writer.end();
  }

  /** Buttons below the message, in place of those that were there. */
  set actions(buttons) {
    this.element.querySelector(".actions")?.remove();
    if (buttons.length) this.element.append(make("p", { className: "actions" }, ...buttons));
  }
}

/** Writes text as it comes; lines between ``` become a block of code. Only the beginning of a line is ever held back. */
class Writer {
  constructor(body) {
    this.body = body;
    this.held = []; // of a line that may become a fence
    this.isInLine = false;
    this.isCode = false;
  }

  write(text, isDraft) {
    for (const part of text.split(/(?<=\n)/)) {
      if (this.isInLine) this.append(part, isDraft);
      else this.begin(part, isDraft);
    }
  }

  /** Shows what is held back; nothing more will come. */
  end() {
    for (const [part, isDraft] of this.held.splice(0)) this.append(part, isDraft);
  }

  begin(part, isDraft) {
    this.held.push([part, isDraft]);
    const line = this.held.map(([text]) => text).join("");
    if (line.startsWith("```") && line.endsWith("\n")) {
      this.held = [];
      this.isCode = !this.isCode;
      this.block = null;
    } else if (!line.startsWith("```") && !"```".startsWith(line)) {
      this.end();
    }
  }

  append(text, isDraft) {
    this.block ??= this.open();
    const last = this.block.lastChild;
    if (last && last.classList.contains("draft") === isDraft) last.firstChild.appendData(text);
    else this.block.append(make("span", { text, className: isDraft ? "draft" : "" }));
    this.isInLine = !text.endsWith("\n");
  }

  open() {
    const block = make(this.isCode ? "code" : "div", { className: this.isCode ? "" : "text" });
    this.body.append(this.isCode ? make("pre", { tabIndex: 0 }, block) : block);
    return block;
  }
}
