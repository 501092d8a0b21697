"""The models baton serves: reading a folder, building the layers, running them.

Importing this package, `baton.models.config` or `baton.models.rope_config` does not import torch.
"""
