"""The processes of a cluster: one folder is one container."""
