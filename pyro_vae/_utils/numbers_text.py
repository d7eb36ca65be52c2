"""Numbers with their standard errors, as text."""

import math


def with_error(value: float, error: float, sign: str = "", plus_minus: str = "±") -> str:
    """Return a value with its standard error, if that is known. The sign "+" shows also a plus."""
    return f"{value:{sign}.2f}" + ("" if math.isnan(error) else f"{plus_minus}{error:.2f}")
