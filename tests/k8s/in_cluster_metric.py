"""Runs in the client pod: the sum of a metric over pods and labels. Arguments: name, addresses."""

import sys
import urllib.request

name, *addresses = sys.argv[1:]
total = 0.0
for address in addresses:
    with urllib.request.urlopen(f"http://{address}:9090/metrics", timeout=10) as page:
        for line in page.read().decode().splitlines():
            if line.startswith((f"{name} ", f"{name}{{")):
                total += float(line.split()[-1])
print(total)
