"""A cluster in which everything fails at random under load, and what its clients see of that.

`python -m tests.chaos --seconds 180 --seed 1`, or `make chaos`.
"""
