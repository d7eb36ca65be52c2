"""ELBO surgery: the aggregated posterior, its mutual information and its marginal KL."""
