"""Load on a server, and what came of it: workloads, the client that sends them, figures and reports.

The simulator gives its results in the same records, so that one report serves both.
"""
