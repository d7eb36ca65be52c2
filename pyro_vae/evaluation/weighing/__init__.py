"""log p(x) by weights: importance sampling, annealed or not, and bounds from both sides."""
