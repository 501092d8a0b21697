"""The worker runtime shared by every role: services, handoffs on both sides, start-up and drain."""
