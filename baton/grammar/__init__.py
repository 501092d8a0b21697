"""What an answer must look like: checking it in the router, keeping to it in the engine. No torch."""
