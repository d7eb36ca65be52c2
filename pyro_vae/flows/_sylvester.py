"""Sylvester flows."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae._utils.checks import require_same_type, require_word
from pyro_vae._utils.init_args import records_init_args
from pyro_vae._utils.numerics import implicit, increasing_root
from pyro_vae._utils.precision import exact_product
from pyro_vae.flows._base import Flow, FlowTransform
from pyro_vae.flows._householder import reflect

_KINDS = ("orthogonal", "householder", "triangular")


@records_init_args
class Sylvester(Flow):
    r"""A Sylvester flow (van den Berg et al. 2018, eq. 13, 8), M planar directions in one layer.

    .. math::
        f(z) = z + Q R \tanh(\tilde R Q^\top z + b), \qquad
        \log|\det J| = \sum_m \log(1 + R_{mm} \tilde R_{mm} (1 - \tanh^2(\cdot)_m))

    Here :math:`R, \tilde R` are upper triangular with :math:`R_{mm}\tilde R_{mm} > -1`, and the M
    columns of Q are orthonormal. The inverse solves M increasing equations, from the last to the
    first. Its gradient comes from the implicit function theorem.

    Args:
        dim: D.
        kind: the form of Q. ``"orthogonal"`` takes it from the QR decomposition of D x M free
            parameters. ``"householder"`` uses a product of ``size`` reflections (M = D).
            ``"triangular"`` uses the identity (M = D), and each layer reverses the order of the
            dimensions.
        size: M, or the number of reflections; at most D, the default.

    Raises:
        ValueError: ``kind`` is not one of these, or ``size`` is not within 1 to D.
    """

    def __init__(self, dim: int, kind: str = "orthogonal", size: int | None = None):
        super().__init__(dim)
        require_word("kind", kind, _KINDS)
        size = dim if size is None else size
        if not 1 <= size <= dim:
            raise ValueError(f"size must be between 1 and the dimension {dim}, got {size}")
        self.kind = kind
        self.rank = size if kind == "orthogonal" else dim
        columns = 0 if kind == "triangular" else size
        self._sizes = [dim * columns, self.rank**2, self.rank**2, self.rank]
        self.num_parameters = sum(self._sizes)

    def forward(self, parameters: Tensor) -> FlowTransform:
        """Return the transform with Q, both triangular matrices and b."""
        columns, r, r_tilde, b = parameters.split(self._sizes, -1)
        columns = columns.unflatten(-1, (self.dim, -1)) if self._sizes[0] else None
        r, r_tilde = (_triangle(raw.unflatten(-1, (self.rank, self.rank))) for raw in (r, r_tilde))
        return _Sylvester(self._basis(columns, r), r, r_tilde, b, self.kind == "triangular")

    def _basis(self, columns: Tensor | None, like: Tensor) -> Tensor:
        identity = torch.eye(self.dim, dtype=like.dtype, device=like.device)
        if self.kind == "triangular":
            return identity
        if self.kind == "orthogonal":
            return torch.linalg.qr(columns + identity[:, : self.rank]).Q
        basis = identity
        for number, v in enumerate((columns + identity[:, : columns.shape[-1]]).unbind(-1)):
            basis = reflect(identity if number == 0 else basis, v.unsqueeze(-2))
        return basis


def _triangle(raw: Tensor) -> Tensor:
    """Return an upper triangular matrix with its diagonal in (-1, 1)."""
    return raw.triu(1) + torch.diag_embed(0.999 * torch.tanh(raw.diagonal(dim1=-2, dim2=-1)))


class _Sylvester(FlowTransform):
    def __init__(self, basis: Tensor, r: Tensor, r_tilde: Tensor, b: Tensor, reverse: bool):
        super().__init__()
        self._basis, self._b, self._reverse = basis, b, reverse
        self._r, self._r_tilde = r, r_tilde
        self._diagonal = (r * r_tilde).diagonal(dim1=-2, dim2=-1)

    def map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self._before_tanh(x))
        y = x + self._out(h)
        log_det = torch.log1p(self._diagonal * (1 - h * h)).sum(-1)
        return y.flip(-1) if self._reverse else y, log_det

    def unmap(self, y: Tensor) -> Tensor:
        y = y.flip(-1) if self._reverse else y
        # With s = R~ Q'x + b, R~ Q'y + b = s + R~ R tanh(s). This system is triangular.
        given, mixing = self._before_tanh(y), exact_product(self._r_tilde, self._r)
        with torch.no_grad():
            s = _solve_upwards(mixing, given)
            h = torch.tanh(s)
            slope = mixing * (1 - h * h).unsqueeze(-2)
            slope = slope + torch.eye(slope.shape[-1], dtype=slope.dtype, device=slope.device)

        def solve(grad: Tensor) -> Tensor:
            solved = torch.linalg.solve_triangular(slope.mT, grad.unsqueeze(-1), upper=False)
            return solved.squeeze(-1)

        s = implicit(s, s + _times(mixing, h) - given, solve)
        return y - self._out(torch.tanh(s))

    def _before_tanh(self, x: Tensor) -> Tensor:
        require_same_type("x", x, self._b)
        return _times(self._r_tilde, _times(self._basis.mT, x)) + self._b

    def _out(self, h: Tensor) -> Tensor:
        return _times(self._basis, _times(self._r, h))


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    # The inverse amplifies rounding, and the determinant is that of the map without rounding.
    return exact_product(matrix, vector.unsqueeze(-1)).squeeze(-1)


def _solve_upwards(mixing: Tensor, given: Tensor) -> Tensor:
    """Solve s + mixing tanh(s) = given for upper triangular mixing, from the last row up."""
    solved = torch.zeros_like(given[..., :0])
    for m in reversed(range(given.shape[-1])):
        rest = (mixing[..., m, m + 1 :] * torch.tanh(solved)).sum(-1)
        target, weight = given[..., m] - rest, mixing[..., m, m]
        reach = weight.abs()
        root = increasing_root(
            lambda s, w=weight, t=target: s + w * torch.tanh(s) - t,
            lambda s, w=weight: 1 + w * (1 - torch.tanh(s).square()),
            target - reach,
            target + reach,
        )
        solved = torch.cat([root.unsqueeze(-1), solved], -1)
    return solved
