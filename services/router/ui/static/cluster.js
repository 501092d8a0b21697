// The cluster as a picture: the router, the workers by role, how full they are, and KV flowing between them.
import { bytes, count, make, shape } from "./format.js";

const GONE_MS = 30000; // how long a worker that left is still shown
const FLOW_MS = 2500; // how long a read is seen
const byId = (id) => document.getElementById(id);
const seen = new Map(); // worker id -> {worker, at, since}
const flowing = new Map(); // "source→target" -> {source, target, rate, until}
let fresh = null; // ids that were there when the page opened

export function showCluster(state, before) {
  const now = performance.now();
  fresh ??= new Set(state.workers.map((one) => one.id));
  for (const worker of state.workers) {
    const known = seen.get(worker.id);
    const back = known && (known.gone || known.worker.incarnation !== worker.incarnation);
    const since = back || (!known && !fresh.has(worker.id)) ? now : known?.since;
    seen.set(worker.id, { worker, at: now, since, gone: false });
  }
  for (const [id, known] of seen) {
    if (known.at === now) continue;
    known.gone = true;
    if (now - known.at > GONE_MS) seen.delete(id);
  }
  noteFlows(state, before, now);
  const all = [...seen.values()].sort((a, b) => a.worker.id.localeCompare(b.worker.id, "en", { numeric: true }));
  byId("row-router").replaceChildren(routerCard(state));
  byId("row-prefill").replaceChildren(...all.filter((one) => one.worker.role === "prefill").map((one) => card(one, now)));
  byId("row-decode").replaceChildren(...all.filter((one) => one.worker.role !== "prefill").map((one) => card(one, now)));
  const alive = all.filter((one) => !one.gone).length;
  byId("cluster-note").textContent = `${alive} worker${alive === 1 ? "" : "s"}${alive < all.length ? `, ${all.length - alive} gone` : ""}`;
  byId("map").classList.toggle("many", all.length > 12);
  drawLinks();
}

function routerCard(state) {
  const { running, waiting } = state.requests;
  return make("div.worker.router", { "data-worker": "router" }, make("b", {}, "router"),
    make("span.load", {}, `${count(running)} running${waiting ? ` · ${count(waiting)} waiting` : ""}`));
}

function card({ worker, gone, since }, now) {
  const condition = gone ? "gone" : worker.draining ? "draining" : worker.avoided ? "avoided" : !worker.usable ? "connecting" : now - since < 8000 ? "new" : "";
  const share = (blocks) => Math.max(0, Math.min(100, (100 * blocks) / Math.max(1, worker.total_blocks)));
  const used = share(worker.total_blocks - worker.free_blocks);
  const cached = Math.max(0, share(worker.cached_blocks) - used);
  const bar = make("div.pool", { title: `${count(worker.free_blocks)} of ${count(worker.total_blocks)} KV blocks can be had, ${count(worker.cached_blocks)} are in the prefix tree; ${bytes(worker.total_blocks * worker.block_bytes)} in all` },
    make("i.used"), make("i.cached"));
  bar.children[0].style.width = `${used}%`;
  bar.children[1].style.width = `${cached}%`;
  const load = [`${count(worker.running)} running`, worker.waiting && `${count(worker.waiting)} waiting`, worker.queued_tokens && `${count(worker.queued_tokens)} tok queued`];
  const node = make(`div.worker.${worker.role}`, { "data-worker": worker.id, title: worker.address },
    make("span.top", {}, make("b", {}, worker.id), make("em", {}, condition || worker.role)),
    bar,
    make("span.load", {}, gone ? "not answering" : load.filter(Boolean).join(" · ")));
  if (condition) node.classList.add(condition);
  if (worker.running && !gone) node.classList.add("busy");
  return node;
}

function noteFlows(state, before, now) {
  if (before) {
    const passed = Math.max(0.1, state.time_s - before.time_s);
    const old = new Map(before.flows.map((flow) => [`${flow.source}→${flow.target}`, flow.bytes]));
    for (const flow of state.flows) {
      const key = `${flow.source}→${flow.target}`;
      const moved = flow.bytes - (old.get(key) ?? 0);
      if (moved > 0) flowing.set(key, { ...flow, rate: moved / passed, until: now + FLOW_MS });
    }
  }
  for (const [key, flow] of flowing) if (flow.until < now) flowing.delete(key);
}

function drawLinks() {
  const svg = byId("links");
  const frame = svg.getBoundingClientRect();
  const place = (id) => byId("map").querySelector(`[data-worker="${CSS.escape(id)}"]`)?.getBoundingClientRect();
  const router = place("router");
  const lines = [];
  for (const [id, known] of seen) {
    const box = place(id);
    if (!box || known.gone) continue;
    if (known.worker.role !== "prefill") lines.push(shape("path", { class: known.worker.running ? "session busy" : "session", d: curve(router, box, frame) }));
  }
  for (const flow of flowing.values()) {
    const [from, to] = [place(flow.source), place(flow.target)];
    if (!from || !to) continue;
    const d = curve(from, to, frame);
    const width = Math.min(9, 2.5 + Math.log10(1 + flow.rate / 1e5) * 1.6);
    lines.push(shape("path", { class: "kv", d, "stroke-width": width }), shape("path", { class: "kv moving", d, "stroke-width": width }));
    const label = shape("text", { class: "rate", ...besideCurve(from, to, frame) });
    label.textContent = `${bytes(flow.rate)}/s`;
    lines.push(label);
  }
  svg.replaceChildren(...lines);
}

const middle = (box) => box.left + box.width / 2;
const beside = (one, other) => Math.abs(one.top - other.top) < 10;

// Where a curve's label does not meet those of others: under the middle of one between neighbours, outside a
// vertical one, and a third of the way along one that crosses others.
function besideCurve(from, to, frame) {
  const [x0, x1] = [middle(from) - frame.left, middle(to) - frame.left];
  if (beside(from, to)) return { x: (x0 + x1) / 2, y: from.bottom - frame.top + 16, "text-anchor": "middle" };
  const [start, end] = (from.top < to.top ? [from.bottom, to.top] : [from.top, to.bottom]).map((y) => y - frame.top);
  if (Math.abs(x0 - x1) > 20) return { x: 0.75 * x0 + 0.25 * x1, y: 0.62 * start + 0.38 * end + 4, "text-anchor": "middle" };
  const left = x0 < frame.width / 2;
  return { x: left ? x0 - 10 : x0 + 10, y: (start + end) / 2 + 4, "text-anchor": left ? "end" : "start" };
}

// From the lower edge of one box to the upper edge of the other; beside each other, from side to side below.
function curve(from, to, frame) {
  const x0 = middle(from) - frame.left;
  const x1 = middle(to) - frame.left;
  if (beside(from, to)) {
    const y = from.bottom - frame.top;
    return `M${x0},${y} C${x0},${y + 34} ${x1},${y + 34} ${x1},${y}`;
  }
  const down = from.top < to.top;
  const y0 = (down ? from.bottom : from.top) - frame.top;
  const y1 = (down ? to.top : to.bottom) - frame.top;
  return `M${x0},${y0} C${x0},${(y0 + y1) / 2} ${x1},${(y0 + y1) / 2} ${x1},${y1}`;
}

addEventListener("resize", drawLinks);
