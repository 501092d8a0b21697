"""KV blocks by name: identity, prefix tree, pool, eviction and the index replica. No tensors here."""
