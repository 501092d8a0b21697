"""Asks a running cluster with the official OpenAI client: `pip install openai`, then run this file."""

import os

from openai import OpenAI

base_url = os.environ.get("BASE_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{base_url}/v1", api_key="unused")
model = client.models.list().data[0].id

completion = client.completions.create(
    model=model, prompt="def read_lines(path):", max_tokens=24, temperature=0
)
print("completion:", completion.choices[0].text)

print("chat: ", end="")
stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What does a list do?"}],
    max_tokens=24,
    seed=7,
    stream=True,
    stream_options={"include_usage": True},
)
for event in stream:
    for choice in event.choices:
        print(choice.delta.content or "", end="", flush=True)
    if event.usage:
        print(f"\nusage: {event.usage.prompt_tokens} + {event.usage.completion_tokens} tokens")
