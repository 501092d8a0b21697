"""DistServe (OSDI 2024) in the simulator: requests per second and GPU that meet both targets, OPT-13B.

The targets are the paper's, 200 ms to the first token and 100 ms per token after it, and half the latter.

Every division of `GPUS` into prefill and decode workers of several tensor parallelisms is ranked by
`baton.planning`'s fluid model, and the best are simulated. Beside them are whole workers, as many as fit:
with prompts in chunks beside decodes, and as the paper's baseline had it, prompts first and decodes waiting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from random import Random

from rich.table import Table
from simulator_search import CONSOLE, GOOD, Figure, highest, ratio

from baton.bench.load import timed
from baton.bench.summary import Targets
from baton.bench.trace import TraceRow
from baton.engine.scheduler import Scheduler
from baton.planning.fleet import Fleet, Offer
from baton.planning.fluid import attained, decode, prefill
from baton.planning.offers import Hardware, offer_of
from baton.routing import Role
from baton.sim.cluster import SimCluster
from baton.sim.peers import PrefillFirst
from baton.sim.simulator import simulate
from baton.sim.workload import from_trace

GPUS = 4
TARGETS = {"100 ms": Targets(0.2, 0.1), "50 ms": Targets(0.2, 0.05)}
PAPER = "DistServe's own simulator on ShareGPT at 100 ms: 1.56"
OPT = Hardware(
    gpu_bytes=80e9,
    weight_bytes=26e9,
    kv_bytes_per_token=819_200,  # 40 layers, keys and values, 5120 wide, 2 bytes
    network_bytes_per_s=100e9,
)
BASELINES: dict[str, tuple[type[Scheduler], tuple[int, ...]]] = {
    "prompts first": (PrefillFirst, (2048,)),
    "chunks": (Scheduler, (512, 1024)),
}


def distserve(
    name: str, source: str, rows: Sequence[TraceRow], degrees: Sequence[int], halvings: int, best: int
) -> list[Figure]:
    """Goodput per GPU, colocated and disaggregated; of the divisions the `best` are simulated."""
    offers = {degree: offer_of(f"distserve:opt-13b:{degree}", OPT) for degree in degrees}
    like = SimCluster((), kv_bytes_per_token=OPT.kv_bytes_per_token)
    layouts: list[tuple[str, str, SimCluster]] = []
    for (kind, (scheduler, budgets)), degree in product(BASELINES.items(), degrees):
        for budget in budgets:
            worker = replace(
                offers[degree].as_role(Role.HYBRID), max_batch_tokens=budget, scheduler=scheduler
            )
            words = f"{GPUS // degree} whole TP{degree}, {kind}, {budget} tokens a step"
            layouts.append((kind, words, replace(like, workers=(worker,) * (GPUS // degree))))
    guessed = {
        fleet: [_guess(fleet, rows, like, targets) for targets in TARGETS.values()]
        for fleet in _fleets(offers)
    }
    likely: dict[Fleet, None] = {}
    for at in range(len(TARGETS)):
        likely |= dict.fromkeys(sorted(guessed, key=lambda fleet: -guessed[fleet][at])[:best])
    for fleet in likely:
        decoders = f"{fleet.decoders} decode TP{fleet.decode.gpus}"
        words = f"{fleet.prefills} prefill TP{fleet.prefill.gpus} + {decoders}"
        layouts.append(("apart", words, fleet.cluster(like)))
    table = Table("requests/s per GPU, at TPOT", *TARGETS, title=f"OPT-13B on {GPUS} A100-80G, {source}")
    goodput: dict[tuple[str, str], float] = {}
    for kind, words, cluster in layouts:
        rates = []
        for tpot, targets in TARGETS.items():
            rates.append(highest(partial(_good, cluster, rows, targets), 0.1, halvings))
            goodput[kind, tpot] = max(goodput.get((kind, tpot), 0.0), rates[-1])
        table.add_row(words, *(f"{rate:.2f}" for rate in rates))
    CONSOLE.print(table)
    CONSOLE.print(
        f"{len(guessed)} divisions were ranked. Unlike the paper: the lengths; routed by predicted cost; KV "
        "moves at 100 GB/s per GPU pair; 90 % of 80 GB; no pipelines. A step of chunks and decodes takes "
        "what both take apart, less one reading of the weights; chunks lose nothing to their size.",
        highlight=False,
    )
    figures = []
    for tpot in TARGETS:
        figure = f"distserve_{name}_{tpot.replace(' ', '_')}"
        first, chunks, apart = (goodput[kind, tpot] for kind in ("prompts first", "chunks", "apart"))
        figures += [
            Figure(f"{figure}_colocated_prompts_first", round(first, 2), "requests/s per GPU"),
            Figure(f"{figure}_colocated_chunks", round(chunks, 2), "requests/s per GPU"),
            Figure(f"{figure}_disaggregated", round(apart, 2), "requests/s per GPU", peer=PAPER),
            ratio(f"{figure}_disaggregated_over_prompts_first", apart, first, "the paper's baseline"),
            ratio(f"{figure}_disaggregated_over_chunks", apart, chunks, "vLLM with chunked prefill"),
        ]
    return figures


def _fleets(offers: dict[int, Offer]) -> Iterator[Fleet]:
    """Every division of the GPUs."""
    for prefills, decodes in product(offers.values(), repeat=2):
        for count in range(1, GPUS // prefills.gpus + 1):
            left = GPUS - count * prefills.gpus
            if left and left % decodes.gpus == 0:
                yield Fleet(prefills, count, decodes, left // decodes.gpus)


def _guess(fleet: Fleet, rows: Sequence[TraceRow], like: SimCluster, targets: Targets) -> float:
    """The goodput per GPU by the fluid model."""

    def good(rate: float) -> bool:
        requests = list(from_trace(_arriving(rows, rate), like.block_tokens))
        prompts = prefill(fleet.prefill, fleet.prefills, requests, like.router_s)
        tpots = decode(fleet, prompts, like.block_tokens, like.kv_bytes_per_token)
        return attained(prompts, tpots, targets).attainment >= GOOD

    return highest(good, 0.1, 4)


def _good(cluster: SimCluster, rows: Sequence[TraceRow], targets: Targets, rate: float) -> bool:
    report = simulate(cluster, from_trace(_arriving(rows, rate), cluster.block_tokens), targets)
    return (report.summary.attainment or 0.0) >= GOOD


def _arriving(rows: Sequence[TraceRow], rate: float) -> Iterator[TraceRow]:
    return timed(rows, "poisson", rate * GPUS, Random(2))
