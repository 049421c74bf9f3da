// Brings the page together: the key, the chat, and the feed of what the engine does.

import { Problem, events, giveKey, request, whenKeyWanted } from "./api.js";
import { Bars } from "./bars.js";
import { start as startChat } from "./chat.js";
import { Stats } from "./stats.js";

const AGAIN = 2000; // ms until a feed that ended is asked for again
const DRAWN = 100; // ms at least between two drawings
const WRITTEN = 350; // and between two sets of numbers, so that they can be read
const PROMPTS = 8;
const ANSWER = 48; // tokens of each of their answers

const $ = (id) => document.getElementById(id);
const bars = new Bars($("bars"), $("tip"));
let stats = new Stats();
let served = null; // the feed's hello
let latest = null; // its last batch

// ---- the key

whenKeyWanted((note) => {
  $("key-form").hidden = false;
  $("key-note").textContent = note;
  status("waiting", "needs a key");
  $("key").focus();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  $("key-form").hidden = true;
  giveKey($("key").value);
  $("key").value = "";
  $("text").focus();
});

// ---- the feed

function status(state, words) {
  if ($("status").textContent === words) return;
  $("status").dataset.state = state;
  $("status").textContent = words;
}

async function follow() {
  for (;;) {
    try {
      const response = await request("live");
      for await (const { event, data } of events(response)) (event === "hello" ? greet : take)(data);
      throw new Problem("The connection ended.");
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      status("bad", error.message);
    }
    await new Promise((resolve) => setTimeout(resolve, AGAIN));
  }
}

function greet(hello) {
  served = hello;
  stats = new Stats();
  bars.budget = hello.token_budget;
  $("model").textContent = hello.model;
  if (hello.policy !== "splitfuse") $("live-title").textContent = `Policy ${hello.policy} at work`;
  document.title = `${hello.model} · splitfuse`;
  status("live", "live");
}

function take(batch) {
  latest = batch;
  stats.add(batch);
  bars.add(batch.steps);
  if (batch.sick) status("bad", batch.sick);
  else status("live", "live");
  wantDrawing();
}

// ---- drawing, at most ten times a second

let wanted = false;
let drawnAt = 0;
let wroteAt = -WRITTEN;

function wantDrawing() {
  if (wanted) return;
  wanted = true;
  requestAnimationFrame(function tick(now) {
    if (now - drawnAt < DRAWN) return void requestAnimationFrame(tick);
    wanted = false;
    drawnAt = now;
    draw();
  });
}

function draw() {
  bars.draw();
  $("idle").hidden = bars.count > 0;
  describeBars();
  if (drawnAt - wroteAt < WRITTEN) return;
  wroteAt = drawnAt;
  $("prefill-rate").textContent = whole(stats.rate("prefill"));
  $("decode-rate").textContent = whole(stats.rate("decode"));
  for (const kind of ["ttft", "itl"]) showTimes($(kind), stats.quantiles(kind, [0.5, 0.95]));
  $("running").textContent = latest.running;
  $("waiting").textContent = latest.waiting;
  const { used, cached } = latest;
  const free = served.blocks - used - cached;
  $("blocks-text").textContent = `${whole(used)} in use · ${whole(cached)} cached · ${whole(free)} free`;
  $("used").style.width = `${(100 * used) / served.blocks}%`;
  $("cached").style.width = `${(100 * cached) / served.blocks}%`;
}

function showTimes(element, [p50, p95]) {
  element.textContent = duration(p50);
  if (p50 === null) return;
  const tail = document.createElement("small");
  tail.textContent = `p95 ${duration(p95)}`;
  element.append(" ", tail);
}

/** For those who can't see the canvas, and for tests. */
function describeBars() {
  const { prompt, decode } = bars.totals();
  Object.assign($("bars").dataset, { bars: bars.count, seen: bars.seen, prompt, decode });
  $("summary").textContent = bars.count ? bars.summary() : "";
}

const whole = (number) => Math.round(number).toLocaleString("en").replaceAll(",", "\u202f");

function duration(ms) {
  if (ms === null) return "–";
  return ms < 10 ? `${ms.toFixed(1)} ms` : ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`;
}

// ---- many prompts at once

async function modelName(signal) {
  if (served) return served.model;
  const models = await (await request("v1/models", { signal })).json();
  return models.data[0].id;
}

/** Random prompts, from half a token budget to six of them, as far as the context allows. */
function randomPrompts() {
  const longest = Math.min(6 * served.token_budget, Math.floor(0.75 * served.max_model_len), served.max_model_len - ANSWER);
  const shortest = Math.min(served.token_budget / 2, longest / 2);
  const lengths = Array.from({ length: PROMPTS }, (_, i) =>
    Math.max(1, Math.round(shortest + ((longest - shortest) * i) / (PROMPTS - 1))),
  );
  for (let i = lengths.length - 1; i > 0; i--) {
    const other = Math.floor(Math.random() * (i + 1));
    [lengths[i], lengths[other]] = [lengths[other], lengths[i]];
  }
  return lengths.map((length) => Array.from({ length }, () => Math.floor(Math.random() * served.vocab_size)));
}

let burst = null; // the AbortController of the prompts under way

async function sendMany() {
  if (burst) return burst.abort();
  if (!served) return;
  const note = $("burst-note");
  burst = new AbortController();
  $("burst").textContent = "Stop them";
  const prompt = randomPrompts();
  const lengths = prompt.map(({ length }) => length);
  note.className = "";
  note.textContent = `Under way: prompts of ${lengths.join(", ")} tokens.`;
  try {
    const body = { model: served.model, prompt, max_tokens: Math.min(ANSWER, served.max_model_len - 1), ignore_eos: true };
    await (await request("v1/completions", { body, signal: burst.signal })).json();
    note.textContent = `All ${PROMPTS} answered: prompts of ${lengths.join(", ")} tokens.`;
  } catch (error) {
    note.className = error.name === "AbortError" ? "" : "problem";
    note.textContent = error.name === "AbortError" ? "Stopped." : error.message;
  }
  burst = null;
  $("burst").textContent = `Send ${PROMPTS} prompts at once`;
}

$("burst").addEventListener("click", sendMany);
startChat(modelName);
follow();
