"""The public front: OpenAI HTTP and gRPC in, tokens out, every request placed on the cluster's workers."""
