#!/usr/bin/env bash
# Asks a running cluster over HTTP with nothing but curl: a completion, then a chat answer as a stream.
set -euo pipefail
BASE_URL=${BASE_URL:-http://127.0.0.1:8000}

echo "models:"
curl --fail-with-body -sS "$BASE_URL/v1/models"

echo; echo "completion:"
curl --fail-with-body -sS "$BASE_URL/v1/completions" \
  -H 'Content-Type: application/json' \
  -d '{"prompt": "def read_lines(path):", "max_tokens": 24, "temperature": 0}'

echo; echo "chat, streamed:"
curl --fail-with-body -sSN "$BASE_URL/v1/chat/completions" \
  -H 'Content-Type: application/json' \
  -d '{"messages": [{"role": "user", "content": "What does a list do?"}], "max_tokens": 24, "stream": true}'
