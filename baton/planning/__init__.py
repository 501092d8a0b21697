"""How many workers of each role does a workload need? Pure functions: no sockets, no clocks, no torch."""
