"""Runs in the client pod: one completion; prints its text, usage and the headers that say what happened.

Arguments: host of the Service, prompt, number of tokens.
"""

import http.client
import json
import sys

host, prompt, tokens = sys.argv[1:]
connection = http.client.HTTPConnection(host, 8000, timeout=60)
body = {"prompt": prompt, "max_tokens": int(tokens), "temperature": 0, "ignore_eos": True}
connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
response = connection.getresponse()
answer = json.loads(response.read())
headers = {name.lower(): value for name, value in response.getheaders() if name.lower().startswith("x-baton")}
print(json.dumps({"status": response.status, "headers": headers, "answer": answer}))
