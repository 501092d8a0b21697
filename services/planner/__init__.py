"""Keeps the number of workers and their roles right for what is asked of a live cluster."""
