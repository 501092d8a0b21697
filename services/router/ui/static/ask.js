// The request box: streams an answer, then shows when what happened to it, or where it would go and why.
import { count, make, seconds } from "./format.js";

const byId = (id) => document.getElementById(id);
const NAMES = {
  tokenize: "tokenize", wait: "wait to be let in", route: "choose workers", send: "send", queue: "queue at worker",
  prefill: "prefill", transfer: "transfer KV", decode: "decode",
};
const TERMS = {
  queue_s: "queue", tier_s: "from host or disk", pull_s: "from a peer", compute_s: "compute", transfer_s: "transfer",
  interference_s: "slows others", decode_s: "shared steps", storage_s: "evicts", affinity_s: "conversation",
};
let state = () => null;
let running = null;

export function prepareAsking(latestState) {
  state = latestState;
  byId("form").addEventListener("submit", (event) => { event.preventDefault(); running ? running.abort() : send(); });
  byId("why").addEventListener("click", explain);
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); if (!running) send(); }
  });
}

function body(extra) {
  const prompt = byId("prompt").value;
  const asked = { model: state().model, max_tokens: Number(byId("tokens").value) || 96, ...extra };
  return JSON.stringify(state().chat ? { ...asked, messages: [{ role: "user", content: prompt }] } : { ...asked, prompt });
}

async function post(path, content, signal) {
  const headers = { "content-type": "application/json" };
  if (byId("key").value) headers.authorization = `Bearer ${byId("key").value}`;
  const response = await fetch(path, { method: "POST", headers, body: content, signal });
  if (response.ok) return response;
  if (response.status === 401) byId("key-field").hidden = false;
  const error = await response.json().catch(() => null);
  throw new Error(error?.error?.message ?? `the router answered ${response.status}`);
}

async function send() {
  if (!state() || !byId("prompt").value.trim()) return;
  running = new AbortController();
  byId("send").textContent = "Stop";
  const answer = byId("answer");
  answer.replaceChildren();
  answer.className = "streaming";
  answer.hidden = false;
  byId("timeline").hidden = byId("routes").hidden = true;
  try {
    const path = state().chat ? "/v1/chat/completions" : "/v1/completions";
    const response = await post(path, body({ stream: true }), running.signal);
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices?.[0];
      answer.append(choice?.delta?.content ?? choice?.text ?? "");
      answer.scrollTop = answer.scrollHeight;
    }
    const id = encodeURIComponent(response.headers.get("x-request-id"));
    const found = await (await fetch(`/ui/timeline?id=${id}`)).json();
    if (found.choices) showPhases(found.choices[0]);
  } catch (error) {
    if (error.name !== "AbortError") complain(error);
  } finally {
    running = null;
    answer.classList.remove("streaming");
    byId("send").textContent = "Send";
  }
}

async function* events(stream) {
  let text = "";
  const decoder = new TextDecoder();
  const reader = stream.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += decoder.decode(value, { stream: true });
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: ?/, "");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

export function showPhases(one) {
  const total = Math.max(...one.phases.map((phase) => phase.end_s), 1e-6);
  const rows = new Map();
  for (const phase of one.phases) rows.set(phase.name, [...(rows.get(phase.name) ?? []), phase]);
  const lines = [...rows].map(([name, phases]) => {
    const track = make("div.track");
    for (const { start_s, end_s } of phases) {
      const part = make(`i.${name}`, { title: `${seconds(end_s - start_s)}, from ${seconds(start_s)} on` });
      part.style.left = `${(100 * start_s) / total}%`;
      part.style.width = `max(2px, ${(100 * (end_s - start_s)) / total}% - 1px)`;
      track.append(part);
    }
    const took = phases.reduce((sum, phase) => sum + phase.end_s - phase.start_s, 0);
    const chunks = name === "prefill" && phases.length > 1 ? ` in ${phases.length} chunks` : "";
    return make("div.phase", {}, make("span", {}, NAMES[name] + chunks), track, make("span.took", {}, seconds(took)));
  });
  const path = one.prefill === "remote" ? `${one.computing_worker} → ${one.decode_worker}` : one.decode_worker;
  const facts = [
    `${count(one.prompt_tokens)} + ${count(one.output_tokens)} tokens`, path && `${one.prefill || "on"} ${path}`,
    one.cached_tokens && `${count(one.cached_tokens)} cached`, one.pull_worker && `prefix from ${one.pull_worker}`,
    one.ttft_s != null && `first token ${seconds(one.ttft_s)} (predicted ${seconds(one.predicted_s)})`, one.placements > 1 && `${one.placements} placements`,
  ];
  byId("timeline").replaceChildren(make("h3", {}, "When what happened"), ...lines, make("p.facts", {}, facts.filter(Boolean).join(" · ")));
  byId("timeline").hidden = false;
  byId("routes").hidden = true;
}

async function explain() {
  if (!state() || !byId("prompt").value.trim()) return;
  try {
    const found = await (await post("/debug/route", body({}))).json();
    showRoutes(found);
  } catch (error) {
    byId("answer").hidden = false;
    complain(error);
  }
}

function showRoutes(found) {
  const worth = (candidate) => Object.entries(candidate.terms).filter(([name, value]) => TERMS[name] && value > 0);
  const most = Math.max(...found.candidates.map((one) => worth(one).reduce((sum, [, value]) => sum + value, 0)), 1e-9);
  const used = new Set();
  const lines = found.candidates.map((one) => {
    const track = make("div.track");
    let at = 0;
    for (const [name, value] of worth(one)) {
      used.add(name);
      const part = make(`i.${name}`, { title: `${TERMS[name]} ${seconds(value)}` });
      part.style.left = `${(100 * at) / most}%`;
      part.style.width = `${(100 * value) / most}%`;
      at += value;
      track.append(part);
    }
    const where = one.prefill ? `${one.prefill.worker} → ${one.decode.worker}` : `${one.decode.worker} alone`;
    const row = make("div.phase", { title: one.reason }, make("span", {}, where), track, make("span.took", {}, seconds(Math.max(0, one.total_s))));
    if (one.chosen) row.classList.add("chosen");
    return row;
  });
  const legend = [...used].flatMap((name) => [make(`i.swatch.${name}`), `${TERMS[name]} `]);
  byId("routes").replaceChildren(
    make("h3", {}, "Where it would go"), ...lines, make("p.legend", {}, ...legend),
    make("p.facts", {}, `${count(found.prompt_tokens)} tokens in ${count(found.prompt_blocks)} blocks · ${found.candidates[0]?.reason ?? ""}`));
  byId("routes").hidden = false;
  byId("timeline").hidden = true;
}

function complain(error) {
  byId("answer").replaceChildren(make("span.error", {}, error.message));
}
