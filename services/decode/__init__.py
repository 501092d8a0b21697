"""The decode worker: streams tokens, from KV it reads or computes itself."""
