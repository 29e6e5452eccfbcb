"""Locally optimal conjugate gradients for the top eigenvector of a symmetric operator, fed with one product a step.

Each step takes the best vector in the span of the present one, its residual and the last direction (Knyazev, SIAM J.
Sci. Comput. 23, 2001): the cost of power iteration, Lanczos's speed, the memory of six vectors.
"""

from __future__ import annotations

import torch


class LobpcgState:
    """The search for the top eigenvector of several rows at once, fed with one product a step.

    Args:
        start: first vectors (rows, elements).
        deflated: vectors to stay orthogonal to (rows, number, elements); ``None``: none.
    """

    def __init__(self, start: torch.Tensor, deflated: torch.Tensor | None) -> None:
        self._deflated = deflated
        self.x = _unit(self._free(start))
        self.ax = torch.zeros_like(start)
        self.p, self.ap = torch.zeros_like(start), torch.zeros_like(start)
        self.value = torch.zeros(start.shape[0], dtype=torch.float64, device=start.device)
        self.residual = torch.full_like(self.value, float("inf"))
        self._step = 0

    def _free(self, v: torch.Tensor) -> torch.Tensor:
        """``v`` without its part along the deflated vectors."""
        if self._deflated is None:
            return v
        return v - torch.einsum("rk,rke->re", torch.einsum("rke,re->rk", self._deflated, v), self._deflated)

    def done(self, rtol: float) -> bool:
        """Whether every row has converged."""
        return bool((self.residual <= rtol).all())

    def next_vectors(self) -> torch.Tensor:
        """The vectors (rows, elements) whose product is needed next."""
        if self._step == 0:
            return self.x
        r = self._free(self.ax - self.value[:, None] * self.x)
        for _ in range(2):  # Gram-Schmidt, again for what rounding left: twice is enough (Kahan and Parlett)
            r = r - _dot(self.x, r) * self.x - _dot(self.p, r) * self.p
            r = _unit(r)
        self._r = self._free(r)
        return self._r

    def update(self, product: torch.Tensor) -> None:
        """Take the product (rows, elements) in, and the best vector of what is spanned by now."""
        self._step += 1
        if self._step == 1:
            self.ax = product
        else:
            basis = torch.stack([self.x, self._r, self.p], 1)
            image = torch.stack([self.ax, product, self.ap], 1)
            small = torch.einsum("rie,rje->rij", basis, image)
            small = (small + small.mT) / 2
            empty = basis.square().sum(-1) < 0.5
            lowest = -1e3 * small.abs().amax((1, 2), keepdim=True).clamp_min(1e-300)
            small = torch.where(torch.diag_embed(empty), lowest, small)
            top = torch.linalg.eigh(small).eigenvectors[..., -1]
            self.x = torch.einsum("ri,rie->re", top, basis)
            self.ax = torch.einsum("ri,rie->re", top, image)
            p = torch.einsum("ri,rie->re", top[:, 1:], basis[:, 1:])
            ap = torch.einsum("ri,rie->re", top[:, 1:], image[:, 1:])
            overlap = _dot(self.x, p)
            p, ap = p - overlap * self.x, ap - overlap * self.ax
            norm = p.norm(dim=1, keepdim=True)
            small_step = norm < 1e-12
            self.p = torch.where(small_step, 0.0, p / norm.clamp_min(1e-300))
            self.ap = torch.where(small_step, 0.0, ap / norm.clamp_min(1e-300))
        self.value = _dot(self.x, self.ax)[:, 0]
        rest = self._free(self.ax - self.value[:, None] * self.x).norm(dim=1)
        self.residual = torch.where(rest == 0, 0.0, rest / self.value.abs().clamp_min(1e-300))


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(1, keepdim=True)


def _unit(v: torch.Tensor) -> torch.Tensor:
    length: torch.Tensor = v.norm(dim=1, keepdim=True)
    return v / length.clamp_min(1e-300)
