"""baton: disaggregated LLM serving. The library; the processes are in `services/`."""

__version__ = "0.1.0"
