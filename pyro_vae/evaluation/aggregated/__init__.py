"""The aggregated posterior: what it takes from the bound, and where the prior misses it."""
