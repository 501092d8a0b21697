"""DistServe (OSDI 2024) in the simulator: requests per second and GPU that meet both targets, OPT-13B.

The targets are the paper's, 200 ms to the first token and 100 ms per token after it, and half the latter.

Every division of `GPUS` into prefill and decode workers of several tensor parallelisms is ranked by
`baton.planning`'s fluid model, and the best are simulated. Beside them are whole workers, as many as fit:
with prompts in chunks beside decodes, and as the paper's baseline had it, prompts first and decodes waiting,
each with steps of `STEPS` tokens. Workers of one role take steps as long as they choose by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from random import Random

from rich.table import Table
from simulator_search import CONSOLE, GOOD, Figure, highest, ratio

from baton.bench.load import timed
from baton.bench.summary import Targets
from baton.bench.trace import TraceRow
from baton.engine.scheduler import Scheduler
from baton.planning.fleet import Fleet, Offer
from baton.planning.fluid import attained, serve
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
    block_tokens=64,
    network_bytes_per_s=100e9,
)
STEPS = (1024, 2048)
BASELINES: dict[str, type[Scheduler]] = {"prompts first": PrefillFirst, "chunks": Scheduler}


def distserve(
    name: str, source: str, rows: Sequence[TraceRow], degrees: Sequence[int], halvings: int, best: int
) -> list[Figure]:
    """Goodput per GPU, colocated and disaggregated; of the divisions the `best` are simulated."""
    offers = {degree: offer_of(f"distserve:opt-13b:{degree}", OPT) for degree in degrees}
    like = SimCluster((), block_tokens=OPT.block_tokens, kv_bytes_per_token=OPT.kv_bytes_per_token)
    layouts: list[tuple[str, str, SimCluster]] = []
    for (kind, scheduler), degree, tokens in product(BASELINES.items(), degrees, STEPS):
        whole = offers[degree].as_role(Role.HYBRID)
        worker = replace(whole, max_batch_tokens=tokens, scheduler=scheduler)
        words = f"{GPUS // degree} whole TP{degree}, {kind}, {tokens} tokens a step"
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
        shares = cache(partial(_shares, cluster, rows))
        for tpot in TARGETS:
            rates.append(highest(partial(_good, shares, tpot), 1.6, halvings))
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
        return attained(*serve(fleet, requests, like), targets).attainment >= GOOD

    return highest(good, 1.6, 4)


def _good(shares: Callable[[float], dict[str, float]], tpot: str, rate: float) -> bool:
    return shares(rate)[tpot] >= GOOD


def _shares(cluster: SimCluster, rows: Sequence[TraceRow], rate: float) -> dict[str, float]:
    """The share of the requests that meets each of `TARGETS`."""
    records = simulate(cluster, from_trace(_arriving(rows, rate), cluster.block_tokens)).records
    return {tpot: sum(map(targets.met_by, records)) / len(records) for tpot, targets in TARGETS.items()}


def _arriving(rows: Sequence[TraceRow], rate: float) -> Iterator[TraceRow]:
    return timed(rows, "poisson", rate * GPUS, Random(2))
