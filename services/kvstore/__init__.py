"""The kvstore: who the workers are and which of them holds which KV block."""
