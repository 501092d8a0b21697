"""baton: disaggregated LLM serving. The library; the processes are in `services/`."""

import os
import sys

__version__ = "0.1.0"

# gRPC's C core reads these when it is imported. Below errors it writes of every connection that ends.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
# Else it polls in a fork, too, which now and then ends with SIGSEGV before it becomes another program.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

if sys.version_info < (3, 11, 3):
    from baton import old_timeouts

    old_timeouts.use()
