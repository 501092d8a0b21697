"""Virtual time: the real policies, pools and index on a cluster that is not there."""
