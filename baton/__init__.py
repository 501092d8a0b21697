"""baton: disaggregated LLM serving. The library; the processes are in `services/`."""

import os

__version__ = "0.1.0"

# gRPC's C core reads this when it is imported; below errors it writes of every connection that ends.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
