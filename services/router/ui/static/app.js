// The page's heart beat: asks for the state once a second and hands it to the parts that show it.
import { showCluster } from "./cluster.js";
import { count, make, seconds } from "./format.js";
import { prepareAsking, showPhases } from "./ask.js";
import { showTiles } from "./tiles.js";

const PERIOD_MS = 1000;
const byId = (id) => document.getElementById(id);
let last = null;

async function beat() {
  try {
    const response = await fetch("/ui/state", { signal: AbortSignal.timeout(5000) });
    if (!response.ok) throw new Error(`the router answered ${response.status}`);
    const state = await response.json();
    show(state, last);
    last = state;
    status("live", "good", "live");
  } catch {
    status("live", "bad", "router does not answer");
  }
  setTimeout(beat, PERIOD_MS);
}

function show(state, before) {
  byId("model").textContent = state.model;
  byId("model").title = `served by baton ${state.version}`;
  byId("policy").textContent = `policy ${state.policy}`;
  const connected = state.kvstore_connected;
  status("kvstore", connected ? "good" : "bad", connected ? `${count(state.index_blocks)} blocks known` : "no kvstore");
  showTiles(byId("tiles"), state, before);
  showCluster(state, before);
  showLatest(state.recent);
}

function status(id, mood, text) {
  byId(id).className = `status ${mood}`;
  byId(id).textContent = text;
}

function showLatest(recent) {
  byId("rows").replaceChildren(...recent.map((one) => {
    const path = one.prefill === "remote" ? `${one.computing_worker} → ${one.decode_worker}` : one.decode_worker;
    const cells = [
      one.request_id.slice(0, 8),
      `${count(one.prompt_tokens)}${one.cached_tokens ? ` (${count(one.cached_tokens)} cached)` : ""}`,
      one.prefill || "–", path || "–", seconds(one.ttft_s), seconds(one.tpot_s),
      count(one.output_tokens), one.outcome,
    ];
    const row = make("tr", { tabindex: "0", title: "Show when what happened" }, ...cells.map((text) => make("td", {}, text)));
    row.addEventListener("click", () => showPhases(one));
    row.addEventListener("keydown", (event) => { if (event.key === "Enter") showPhases(one); });
    return row;
  }));
  if (!recent.length) {
    byId("rows").append(make("tr", {}, make("td.empty", { colspan: "8" }, "Nothing has ended yet.")));
  }
}

prepareAsking(() => last);
beat();
