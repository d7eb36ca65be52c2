"""A pair of Pyro programs, run and scored."""
