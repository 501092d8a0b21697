"""Pairs that are left out of the comparison could not have been chosen."""

from __future__ import annotations

from unittest.mock import patch

import pytest
from hypothesis import given

from baton.routing import ClusterView, Request, Unplaceable
from baton.routing.candidates import all_candidates, offers
from baton.routing.choice import tolerance_s
from tests.unit.routing.clusters import clusters, requests


@given(requests(), clusters())
def test_every_placement_as_good_as_the_best_is_among_the_offers(
    request: Request, cluster: ClusterView
) -> None:
    try:
        decoders = cluster.decoders(request)
    except Unplaceable:
        return
    with patch("baton.routing.candidates._SHORTLIST", len(cluster.workers)):
        offered = offers(request, cluster, decoders)
        every = all_candidates(request, cluster)
    best = min(offered, key=lambda offer: offer.total_s)
    assert best.total_s == pytest.approx(min(candidate.total_s for candidate in every))
    limit_s = best.total_s + tolerance_s(best.first_token_s)
    found = {(offer.prefill.worker.worker_id, offer.side.worker.worker_id) for offer in offered}
    for candidate in every:
        if candidate.total_s < limit_s - 1e-9:
            assert candidate.placement.pair in found
