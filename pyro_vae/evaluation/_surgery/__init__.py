"""ELBO surgery: the aggregated posterior, and what it takes from the bound."""
