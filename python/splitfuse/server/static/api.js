// Requests to the server: the API key, errors in words, and server-sent events.

const KEY = "splitfuse.key";
let asking = null; // while the key is being asked for: {promise, given}

/** What a person is told of a request that did not succeed. */
export class Problem extends Error {}

/** sessionStorage, or nothing where the browser forbids it. */
export const store = {
  get(name) {
    try {
      return JSON.parse(sessionStorage.getItem(name));
    } catch {
      return null;
    }
  },
  set(name, value) {
    try {
      sessionStorage.setItem(name, JSON.stringify(value));
    } catch {
      // It is forgotten when the page is left.
    }
  },
};

let key = store.get(KEY);

/** Called with a note for the person ("" the first time) when the server asks for a key. */
let onKeyWanted = () => {};

export function whenKeyWanted(callback) {
  onKeyWanted = callback;
}

export function giveKey(value) {
  key = value;
  store.set(KEY, value);
  asking?.given();
  asking = null;
}

function askKey(sent) {
  if (sent !== key) return Promise.resolve(); // another one has been given since
  if (!asking) {
    asking = {};
    asking.promise = new Promise((given) => (asking.given = given));
    onKeyWanted(sent ? "The server did not accept that key." : "");
  }
  return asking.promise;
}

/** fetch with the key. Waits for one where the server asks for it; throws a Problem unless it succeeds. */
export async function request(path, { body, signal } = {}) {
  for (;;) {
    const sent = key;
    const headers = {};
    if (body) headers["Content-Type"] = "application/json";
    if (sent) headers.Authorization = `Bearer ${sent}`;
    let response;
    try {
      response = await fetch(path, {
        method: body ? "POST" : "GET",
        headers,
        body: body && JSON.stringify(body),
        signal,
        cache: "no-store",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The server can't be reached.");
    }
    if (response.ok) return response;
    if (response.status !== 401) throw new Problem(await explain(response));
    await Promise.race([askKey(sent), aborted(signal)]);
  }
}

function aborted(signal) {
  return new Promise((_, reject) =>
    signal?.addEventListener("abort", () => reject(new DOMException("", "AbortError")), { once: true }),
  );
}

async function explain(response) {
  let said = "";
  try {
    const { error } = await response.json();
    said = typeof error === "string" ? error : (error?.message ?? "");
  } catch {
    // Not JSON: the status has to do.
  }
  return explained(response.status, said);
}

function explained(status, said) {
  if (status === 413) return "That is too long for the server.";
  if (status === 429) return "The server is busy: as many wait as may. Try again in a moment.";
  if (status === 503) return `The server is not ready${said ? `: ${said}` : ""}.`;
  if (status === 400 && /context/.test(said)) {
    return "That and its longest answer don't fit the model's context. Lower the longest answer, or begin a new chat.";
  }
  if (said) return said[0].toUpperCase() + said.slice(1) + (/[.!?]$/.test(said) ? "" : ".");
  return `The server answered with an error (${status}).`;
}

/** The events of a response: {event, data}, data parsed. Ends with the stream or at [DONE]. Throws a Problem for an
 * error sent in the stream. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const frames = (held + value).split("\n\n");
      held = frames.pop();
      for (const frame of frames) {
        const fields = frame.split("\n").map((line) => line.split(/: ?(.*)/s, 2));
        const data = fields.filter(([name]) => name === "data").map(([, text]) => text).join("\n");
        if (data === "[DONE]") return;
        if (!data) continue; // a comment that keeps the connection alive
        const parsed = JSON.parse(data);
        if (parsed.error) throw new Problem(explained(parsed.error.code, parsed.error.message ?? ""));
        yield { event: fields.find(([name]) => name === "event")?.[1], data: parsed };
      }
    }
  } catch (error) {
    if (error instanceof Problem || error.name === "AbortError") throw error;
    throw new Problem("The connection broke.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
