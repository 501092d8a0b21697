"""The prefill worker: turns prompts into KV blocks that decode workers read."""
