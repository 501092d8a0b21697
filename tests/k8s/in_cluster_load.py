"""Runs in the client pod: asks the router until standard input ends, then prints what came of it as JSON.

Arguments: host of the Service, number of requests at a time. Prints `answered` once every one of them has had
an answer. A connection that ends with the router it led to is tried again, as any client of a Service must.
"""

import http.client
import json
import sys
import threading

TOKENS = 24
PROMPTS = ["def read_lines(path):", "class Queue:", "import os", "for line in file:"]

host, concurrency = sys.argv[1], int(sys.argv[2])
stopping = threading.Event()
first = threading.Semaphore(0)
lock = threading.Lock()
outcome = {"answered": 0, "reconnected": 0, "failed": [], "texts": {prompt: [] for prompt in PROMPTS}}


def answer(prompt):
    """The text, streamed to its end; raises ConnectionError where the router went away."""
    body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    connection = http.client.HTTPConnection(host, 8000, timeout=60)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{response.status} {response.read().decode()[:300]}")
        text, reason = "", None
        for line in response:
            if line == b"data: [DONE]\n":
                if reason != "length":
                    raise RuntimeError(f"ended with {reason}: {text!r}")
                return text
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                for choice in event["choices"]:
                    text += choice["text"]
                    reason = choice["finish_reason"] or reason
        raise ConnectionError("the stream ended before its end")
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(str(error)) from error
    finally:
        connection.close()


def client(number):
    asked = number
    while not stopping.is_set():
        prompt = PROMPTS[asked % len(PROMPTS)]
        asked += 1
        try:
            text = answer(prompt)
        except ConnectionError:
            with lock:
                outcome["reconnected"] += 1
            stopping.wait(0.2)
            continue
        except Exception as error:
            with lock:
                outcome["failed"].append(repr(error))
            stopping.wait(0.2)
            continue
        with lock:
            outcome["answered"] += 1
            if text not in outcome["texts"][prompt]:
                outcome["texts"][prompt].append(text)
        first.release()


threads = [threading.Thread(target=client, args=(number,)) for number in range(concurrency)]
for thread in threads:
    thread.start()
for _ in threads:
    first.acquire()
print("answered", flush=True)
sys.stdin.read()
stopping.set()
for thread in threads:
    thread.join()
print(json.dumps(outcome))
