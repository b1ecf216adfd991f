"""Linen networks, each beside the frozen config that describes it."""
