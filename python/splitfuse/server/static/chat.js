// The conversation: it streams each answer, and says how fast it came.

import { Problem, events, request, store } from "./api.js";

const SAVED = "splitfuse.chat";
const NEAR = 40; // px from the end of the log: it follows the answer only from there

const $ = (id) => document.getElementById(id);
const log = $("log");
const text = $("text");
const send = $("send");
const empty = $("empty");

let turns = []; // {role, content, meta}: those that were answered, and their answers
let running = null; // the AbortController of the answer that streams in

export function start(modelName) {
  restore();
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) running.abort();
    else if (text.value.trim()) say(text.value.trim(), modelName);
  });
  text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!running) $("ask").requestSubmit();
  });
  text.addEventListener("input", fit);
  for (const chip of empty.querySelectorAll("button")) {
    chip.addEventListener("click", () => running || say(chip.textContent, modelName));
  }
  $("new-chat").addEventListener("click", () => {
    running?.abort();
    turns = [];
    log.replaceChildren(empty);
    save();
    text.focus();
  });
  $("temperature").addEventListener("input", showTemperature);
  $("settings").addEventListener("change", save);
}

async function say(question, modelName) {
  empty.remove();
  text.value = "";
  fit();
  const asked = add("user", question);
  const answer = add("assistant", "");
  log.scrollTop = log.scrollHeight;
  running = new AbortController();
  send.textContent = "Stop";
  log.setAttribute("aria-busy", "true");
  const heard = { content: "", began: performance.now() };
  try {
    await listen(question, await modelName(running.signal), heard, (piece) => append(answer, piece));
  } catch (error) {
    if (error.name === "AbortError") heard.end = "stopped";
    else failed(asked, answer, error, () => say(question, modelName));
  }
  running = null;
  send.textContent = "Send";
  log.removeAttribute("aria-busy");
  if (!answer.isConnected) return; // a new chat was begun meanwhile
  if (heard.content || heard.end) {
    const meta = describe(heard);
    note(answer, meta);
    turns.push({ role: "user", content: question }, { role: "assistant", content: heard.content, meta });
    save();
  }
}

/** Asks, and fills `heard`: content, when the first and the last token came, tokens, end. */
async function listen(question, model, heard, show) {
  const system = $("system").value.trim();
  const messages = [...turns, { role: "user", content: question }].map(({ role, content }) => ({ role, content }));
  if (system) messages.unshift({ role: "system", content: system });
  const response = await request("v1/chat/completions", {
    signal: running.signal,
    body: {
      model,
      messages,
      temperature: Number($("temperature").value),
      max_tokens: Math.max(1, Math.round(Number($("max-tokens").value)) || 256),
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    },
  });
  for await (const { data } of events(response)) {
    const tokens = data.usage?.completion_tokens ?? heard.tokens;
    if (tokens > 0 && tokens !== heard.tokens) {
      heard.last = performance.now();
      heard.first ??= heard.last;
      heard.firstTokens ??= tokens;
      heard.tokens = tokens;
    }
    const choice = data.choices?.[0];
    if (choice?.delta?.content) {
      heard.content += choice.delta.content;
      show(choice.delta.content);
    }
    heard.end = choice?.finish_reason ?? heard.end;
  }
}

function describe({ began, first, last, tokens, firstTokens, end }) {
  const parts = [];
  if (first) parts.push(`first token after ${((first - began) / 1000).toFixed(2)} s`);
  if (tokens > firstTokens) parts.push(`${((tokens - firstTokens) / ((last - first) / 1000)).toFixed(1)} tokens/s`);
  if (tokens) parts.push(`${tokens} token${tokens === 1 ? "" : "s"}`);
  if (end === "length") parts.push("cut at the longest answer");
  if (end === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

// ---- the log

function add(role, content) {
  const message = document.createElement("div");
  message.className = `message ${role}`;
  const body = document.createElement("div");
  body.className = "text";
  body.textContent = content;
  const speaker = document.createElement("span");
  speaker.className = "hidden";
  speaker.textContent = role === "user" ? "You:" : "Model:";
  message.append(speaker, body);
  log.append(message);
  return message;
}

function append(message, piece) {
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR;
  message.querySelector(".text").append(piece);
  if (follows) log.scrollTop = log.scrollHeight;
}

function note(message, words) {
  if (!words) return;
  const meta = document.createElement("p");
  meta.className = "meta";
  meta.textContent = words;
  message.append(meta);
  log.scrollTop = log.scrollHeight;
}

function failed(asked, answer, error, again) {
  if (!(error instanceof Problem)) console.error(error);
  answer.classList.add("failed");
  const problem = document.createElement("p");
  problem.className = "problem";
  problem.textContent = error instanceof Problem ? error.message : "Something went wrong on this page.";
  const retry = document.createElement("button");
  retry.type = "button";
  retry.className = "chip";
  retry.textContent = "Try again";
  retry.addEventListener("click", () => {
    if (running) return;
    asked.remove();
    answer.remove();
    again();
  });
  problem.append(retry);
  answer.append(problem);
  log.scrollTop = log.scrollHeight;
}

// ---- what is kept while the tab is open

function save() {
  const settings = Object.fromEntries(["system", "temperature", "max-tokens"].map((id) => [id, $(id).value]));
  store.set(SAVED, { turns, settings });
}

function restore() {
  const saved = store.get(SAVED);
  for (const [id, value] of Object.entries(saved?.settings ?? {})) $(id).value = value;
  showTemperature();
  turns = saved?.turns ?? [];
  if (turns.length) empty.remove();
  for (const turn of turns) note(add(turn.role, turn.content), turn.meta);
}

function showTemperature() {
  $("temperature-value").textContent = Number($("temperature").value).toFixed(1);
}

function fit() {
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight + 2}px`;
}
