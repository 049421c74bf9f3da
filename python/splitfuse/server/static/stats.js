// What the feed's batches add up to: rates over the last seconds, quantiles over the last minute.

const RATE = 2000; // ms
const MINUTE = 60000;

export class Stats {
  #counts = []; // {now, prefill, decode}
  #times = { ttft: [], itl: [] }; // [when, ms, how many]

  add({ now, prefill, decode, ttft, itl }) {
    if (prefill < (this.#counts.at(-1)?.prefill ?? 0)) this.#counts = []; // the feed began anew
    this.#counts.push({ now, prefill, decode });
    while (this.#counts.length > 2 && this.#counts[1].now <= now - RATE) this.#counts.shift();
    for (const ms of ttft) this.#times.ttft.push([now, ms, 1]);
    for (const [ms, count] of itl) this.#times.itl.push([now, ms, count]);
    for (const list of Object.values(this.#times)) {
      while (list.length && list[0][0] < now - MINUTE) list.shift();
    }
  }

  /** Tokens a second of "prefill" or "decode". */
  rate(kind) {
    const [from, to] = [this.#counts[0], this.#counts.at(-1)];
    return to && to.now > from.now ? ((to[kind] - from[kind]) / (to.now - from.now)) * 1000 : 0;
  }

  /** Milliseconds, one for each share of `shares`, ascending; null if there are no times of "ttft" or "itl". */
  quantiles(kind, shares) {
    const sorted = this.#times[kind].map(([, ms, count]) => [ms, count]).sort((a, b) => a[0] - b[0]);
    const total = sorted.reduce((sum, [, count]) => sum + count, 0);
    let [index, seen] = [0, sorted[0]?.[1]];
    return shares.map((share) => {
      if (!total) return null;
      while (seen < share * total) seen += sorted[++index][1];
      return sorted[index][0];
    });
  }
}
