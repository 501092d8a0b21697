// How the last minute was: a number for each question, and its course since the page is open.
import { count, make, seconds, shape } from "./format.js";

const KEPT = 60;
const courses = new Map();

export function showTiles(where, state, before) {
  const { latency, goodput, requests } = state;
  const sum = (key) => Object.values(goodput).reduce((total, one) => total + one[key], 0);
  const [ended, good] = [sum("ended"), sum("good")];
  const passed = before ? state.time_s - before.time_s : 0;
  const rate = passed ? Math.max(0, requests.output_tokens - before.requests.output_tokens) / passed : 0;
  const tail = (kind) => (latency[kind] ? `p90 ${seconds(latency[kind].p90)} · p99 ${seconds(latency[kind].p99)}` : "nothing in the last minute");
  const tiles = [
    ["First token", seconds(latency.ttft?.p50), tail("ttft"), latency.ttft?.p50],
    ["Per token", seconds(latency.tpot?.p50), tail("tpot"), latency.tpot?.p50],
    ["Tokens / s", count(Math.round(rate)), `${count(requests.output_tokens)} since start`, rate],
    ["Requests", count(requests.running), requests.waiting ? `${count(requests.waiting)} waiting` : "none waiting", requests.running],
    ["Goodput", ended ? `${Math.round((100 * good) / ended)} %` : "–",
      `first ≤ ${seconds(state.targets[0])}, then ≤ ${seconds(state.targets[1])}`, ended ? good / ended : undefined],
  ];
  where.replaceChildren(...tiles.map(([name, value, note, level]) => {
    const course = courses.get(name) ?? [];
    courses.set(name, [...course, level ?? 0].slice(-KEPT));
    return make("div.tile", {}, make("span.name", {}, name), make("strong", {}, value), make("small", {}, note), sparkline(courses.get(name)));
  }));
}

function sparkline(values) {
  const top = Math.max(...values, 1e-9);
  const points = values.map((value, at) => `${(100 * (KEPT - values.length + at)) / (KEPT - 1)},${28 - (26 * value) / top}`);
  const svg = shape("svg", { viewBox: "0 0 100 30", preserveAspectRatio: "none", class: "spark", "aria-hidden": "true" });
  svg.append(
    shape("polygon", { points: `${points[0].split(",")[0]},30 ${points.join(" ")} 100,30` }),
    shape("polyline", { points: points.join(" ") }),
  );
  return svg;
}
