"""The live page at /ui of the router's own port, and what it asks for."""
