// The forwards as bars on a canvas: decodes at the bottom, prompt chunks above them, the token budget as a line.

const MOST = 120; // bars
const NARROWEST = 5; // px from one bar to the next
const SHADES = { prompt: 4, decode: 2 };
const FADED = 0.3; // opacity of what belongs to other sequences while one is looked at
const ROOM = 18; // px above the budget, for its name
const THINNEST = 2; // px of a bar: one token can be less than one

/** A forward as segments from the bottom: {kind, sequence, tokens}. */
function segments(step) {
  return [
    ...step.d.map((sequence) => ({ kind: "decode", sequence, tokens: 1 })),
    ...step.p.map(([sequence, tokens]) => ({ kind: "prompt", sequence, tokens })),
  ];
}

const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
const sum = (list) => list.reduce((total, { tokens }) => total + tokens, 0);

export class Bars {
  budget = 0;
  seen = 0; // forwards, since the page was opened
  #steps = []; // {ms, parts, tokens}, the last ones
  #frozen = null; // those shown while somebody looks at one
  #at = null; // {x, y} of the pointer, or {index} by keyboard
  #perToken = 1; // px
  #colors = {};

  constructor(canvas, tip) {
    this.canvas = canvas;
    this.tip = tip;
    this.context = canvas.getContext("2d");
    new ResizeObserver(() => this.draw()).observe(canvas);
    const dark = matchMedia("(prefers-color-scheme: dark)");
    dark.addEventListener("change", () => this.#recolor());
    this.#recolor();
    this.#listen();
  }

  add(steps) {
    const fresh = steps.map((step) => {
      const parts = segments(step);
      return { ms: step.ms, parts, tokens: sum(parts) };
    });
    this.seen += fresh.length;
    this.#steps = [...this.#steps, ...fresh].slice(-MOST); // another list: the frozen one stays
  }

  /** What is drawn, in words. */
  summary() {
    const shown = this.#shown();
    const mixed = shown.filter(({ parts }) => new Set(parts.map((part) => part.kind)).size === 2).length;
    const full = shown.filter(({ tokens }) => tokens >= this.budget).length;
    const mean = shown.length ? Math.round(shown.reduce((all, { tokens }) => all + tokens, 0) / shown.length) : 0;
    return (
      `The last ${shown.length} forwards: ${mean} of ${this.budget} tokens on average, ${full} of them full, ` +
      `${mixed} with prompt chunks beside decodes.`
    );
  }

  /** Tokens drawn, by kind. */
  totals() {
    const parts = this.#shown().flatMap((step) => step.parts);
    return Object.fromEntries(
      ["prompt", "decode"].map((kind) => [kind, sum(parts.filter((part) => part.kind === kind))]),
    );
  }

  get count() {
    return this.#shown().length;
  }

  draw() {
    const { width, height } = this.canvas.getBoundingClientRect();
    const scale = devicePixelRatio;
    const [wide, high] = [Math.round(width * scale), Math.round(height * scale)];
    if (this.canvas.width !== wide || this.canvas.height !== high) Object.assign(this.canvas, { width: wide, height: high });
    this.context.setTransform(scale, 0, 0, scale, 0, 0);
    this.context.clearRect(0, 0, width, height);
    this.context.fillStyle = this.#colors.line;
    this.context.fillRect(0, height - 1, width, 1);
    const shown = this.#shown();
    this.#perToken = (height - ROOM) / Math.max(this.budget, ...shown.map((step) => step.tokens), 1);
    const looked = this.#look();
    const pitch = this.#pitch();
    const first = width - shown.length * pitch;
    shown.forEach((step, index) => this.#drawBar(step, first + index * pitch, looked, index));
    this.#drawBudget(width);
    this.#showTip(looked);
  }

  // ---- geometry

  #slots() {
    return Math.max(20, Math.min(MOST, Math.floor(this.canvas.clientWidth / NARROWEST)));
  }

  #pitch() {
    return this.canvas.clientWidth / this.#slots();
  }

  #shown() {
    return (this.#frozen ?? this.#steps).slice(-this.#slots());
  }

  #height(tokens) {
    return tokens * this.#perToken;
  }

  /** What is looked at: {index, step, part}, part undefined beside the bar's segments; null: nothing. */
  #look() {
    if (!this.#at) return null;
    const shown = this.#shown();
    const missing = this.#slots() - shown.length;
    const index = this.#at.index ?? Math.floor(this.#at.x / this.#pitch()) - missing;
    const step = shown[index];
    if (!step) return null;
    let top = 0;
    const from = this.canvas.clientHeight - (this.#at.y ?? -1);
    const part = step.parts.find(({ tokens }) => from <= (top += this.#height(tokens)));
    return { index, step, part: this.#at.index === undefined ? part : undefined };
  }

  // ---- drawing

  #recolor() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(`--${name}`).trim();
    for (const [kind, length] of Object.entries(SHADES)) {
      this.#colors[kind] = Array.from({ length }, (_, i) => read(`${kind}-${i}`));
    }
    for (const name of ["budget", "line"]) this.#colors[name] = read(name);
    this.font = `12px ${style.getPropertyValue("font-family") || "sans-serif"}`;
    this.draw();
  }

  #color({ kind, sequence }) {
    return this.#colors[kind][sequence % SHADES[kind]];
  }

  #drawBar(step, x, looked, index) {
    const { context } = this;
    const gap = this.#pitch() > 4 ? 1 : 0.5;
    let bottom = this.canvas.clientHeight;
    for (const part of looked ? step.parts : this.#merged(step)) {
      const high = Math.max(this.#height(part.tokens), step.parts.length === 1 ? THINNEST : 0);
      const faded = looked && (looked.part ? part.sequence !== looked.part.sequence : index !== looked.index);
      context.globalAlpha = faded ? FADED : 1;
      context.fillStyle = this.#color(part);
      context.fillRect(x + gap / 2, bottom - high, this.#pitch() - gap, high > 3 ? high - 1 : high);
      bottom -= high;
    }
    context.globalAlpha = 1;
  }

  /** The segments of a bar, decodes too thin to be told apart as one. */
  #merged(step) {
    const decodes = step.parts.filter(({ kind }) => kind === "decode");
    if (decodes.length < 2 || this.#height(1) > 3) return step.parts;
    return [{ kind: "decode", sequence: 0, tokens: decodes.length }, ...step.parts.slice(decodes.length)];
  }

  #drawBudget(width) {
    if (!this.budget) return;
    const { context } = this;
    const y = Math.round(this.canvas.clientHeight - this.#height(this.budget)) + 0.5;
    context.strokeStyle = context.fillStyle = this.#colors.budget;
    context.setLineDash([4, 4]);
    context.beginPath();
    context.moveTo(0, y);
    context.lineTo(width, y);
    context.stroke();
    context.setLineDash([]);
    context.font = this.font;
    context.textAlign = "left";
    context.textBaseline = "alphabetic";
    context.fillText(`token budget ${this.budget}`, 0, y - 5);
    if (this.#frozen) {
      context.textAlign = "right";
      context.fillText("held while you look", width, y - 5);
    }
  }

  #showTip(looked) {
    this.tip.hidden = !looked;
    if (!looked) return;
    const { step, part, index } = looked;
    const title = document.createElement("strong");
    title.textContent = `${count(step.tokens, "token")} in ${step.ms.toFixed(1)} ms`;
    const rows = this.#tipRows(step, part);
    this.tip.replaceChildren(title, ...rows);
    const width = this.canvas.clientWidth;
    const middle = width - (this.#shown().length - index - 0.5) * this.#pitch();
    const right = middle > width / 2;
    const left = right ? middle - this.tip.offsetWidth - 12 : middle + 12;
    this.tip.style.transform = `translate(${Math.max(0, Math.min(left, width - this.tip.offsetWidth))}px, ${ROOM + 6}px)`;
  }

  #tipRows(step, part) {
    const rows = [];
    const row = (words, color, other) => {
      const line = document.createElement("div");
      line.className = other ? "row other" : "row";
      line.textContent = words;
      line.style.setProperty("--swatch", color);
      rows.push(line);
    };
    const prompts = step.parts.filter(({ kind }) => kind === "prompt");
    const decodes = step.parts.filter(({ kind }) => kind === "decode");
    const chunk = ({ sequence, tokens }) => `Prompt of sequence ${sequence}: ${count(tokens, "token")}`;
    if (part?.kind === "decode") row(`Next token of sequence ${part.sequence}`, this.#color(part));
    for (const prompt of part?.kind === "prompt" ? [part] : part ? [] : prompts.slice(-4).reverse()) {
      row(chunk(prompt), this.#color(prompt));
    }
    if (!part && prompts.length > 4) row(`${prompts.length - 4} more prompts`, this.#color(prompts[0]), true);
    if (!part && decodes.length) {
      row(`Next token of ${count(decodes.length, "answer")}`, this.#color(decodes[0]));
    }
    const others = step.parts.length - 1;
    if (part && others) row(`beside ${count(others, "other sequence")}`, "transparent", true);
    return rows;
  }

  // ---- looking

  #listen() {
    const { canvas } = this;
    const point = (event) => {
      const box = canvas.getBoundingClientRect();
      this.#hold({ x: event.clientX - box.left, y: event.clientY - box.top });
    };
    canvas.addEventListener("pointermove", (event) => event.pointerType === "touch" || point(event));
    canvas.addEventListener("pointerleave", (event) => event.pointerType === "touch" || this.#hold(null));
    canvas.addEventListener("click", point);
    document.addEventListener("pointerdown", (event) => event.target === canvas || this.#hold(null));
    canvas.addEventListener("blur", () => this.#hold(null));
    canvas.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") this.#hold(null);
      if (!move) return;
      event.preventDefault();
      const last = this.count - 1;
      const from = this.#look()?.index ?? last + 1;
      this.#hold({ index: Math.max(0, Math.min(last, from + move)) });
    });
  }

  #hold(at) {
    if (!at && !this.#at) return;
    this.#at = at;
    this.#frozen = at ? (this.#frozen ?? this.#steps) : null;
    this.draw();
  }
}
