"""Who may do what: API keys and their limits, certificates, and the files both come from."""
