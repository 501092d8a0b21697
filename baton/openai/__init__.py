"""OpenAI's HTTP interface as values: what requests may say, what answers look like. No sockets."""
