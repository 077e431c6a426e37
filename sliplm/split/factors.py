"""The most sensitive part of a weight matrix: its leading singular triplets (SLIP, arXiv 2407.10886, section 4)."""

from __future__ import annotations

from typing import NamedTuple

import torch

EXACT_BELOW = 1024  # smaller side up to which the Gram matrix is diagonalised outright
_LANCZOS_STEPS = 24
_PROBES = 4
_QUANTILES = 1024


class Factors(NamedTuple):
    """Leading singular triplets of a matrix (N, K), and a sample of what lies below them.

    u (N, k), s (k,) descending, vt (k, K), rest: (any,) singular values that represent the residual's spectrum.
    """

    u: torch.Tensor
    s: torch.Tensor
    vt: torch.Tensor
    rest: torch.Tensor


def leading(weight: torch.Tensor, rank: int, generator: torch.Generator) -> Factors:
    """Top-`rank` singular triplets of float32 `weight` (N, K), and the spectrum of the residual.

    Exact where the smaller side is at most EXACT_BELOW (eigenvectors of the Gram matrix, in float64); otherwise
    randomized subspace iteration (Halko, Martinsson and Tropp, SIAM Review 2011, algorithm 4.4) and, for the residual's
    spectrum, stochastic Lanczos quadrature (Ubaru, Chen and Saad, SIMAX 2017), whose memory is a few vectors.
    """
    if weight.shape[0] < weight.shape[1]:
        f = leading(weight.T, rank, generator)
        return Factors(f.vt.T.contiguous(), f.s, f.u.T.contiguous(), f.rest)
    rank = min(rank, weight.shape[1])
    if weight.shape[1] <= EXACT_BELOW:
        return _exact(weight, rank)
    u, s, vt = _randomized(weight, rank, generator)
    return Factors(u, s, vt, _spectrum(weight, u, s, vt, generator))


def _exact(weight: torch.Tensor, rank: int) -> Factors:
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    for block in weight.split(8192):
        wide = block.double()
        gram += wide.T @ wide
    eigenvalues, v = torch.linalg.eigh(gram)
    s_all = eigenvalues.clamp_min(0).sqrt().flip(0).float()
    vt = v.flip(1)[:, :rank].T.float().contiguous()
    s = s_all[:rank]
    u = (weight @ vt.T) / s.clamp_min(torch.finfo(torch.float32).tiny)
    return Factors(u, s, vt, s_all[rank:] if len(s_all) > rank else torch.zeros(1))


def _randomized(
    weight: torch.Tensor, rank: int, generator: torch.Generator, oversample: int = 16, iterations: int = 6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = min(rank + oversample, weight.shape[1])
    v = torch.randn(weight.shape[1], width, generator=generator)
    for _ in range(iterations):
        v, _ = torch.linalg.qr(weight.T @ torch.linalg.qr(weight @ v)[0])
    u, s, wt = torch.linalg.svd((weight @ v).double(), full_matrices=False)
    vt = wt @ v.T.double()
    return u[:, :rank].float().contiguous(), s[:rank].float(), vt[:rank].float().contiguous()


def _spectrum(
    weight: torch.Tensor, u: torch.Tensor, s: torch.Tensor, vt: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Evenly spaced quantiles of the spectral density of weight - u s vt (N, K), N >= K, off its null space."""
    steps = min(_LANCZOS_STEPS, weight.shape[1] - 1)
    basis = torch.randn(weight.shape[1], _PROBES, generator=generator)
    basis -= vt.T @ (vt @ basis)  # the residual's own null space is not part of its spectrum
    basis /= basis.norm(dim=0)
    history = [basis]
    alphas, betas = [], []
    for step in range(steps):
        image = weight @ basis - u @ (s[:, None] * (vt @ basis))
        image = weight.T @ image - vt.T @ (s[:, None] * (u.T @ image))
        alphas.append((image * basis).sum(0))
        for past in history:  # full reorthogonalisation: without it Ritz values repeat
            image -= past * (past * image).sum(0)
        beta = image.norm(dim=0)
        if step + 1 < steps:
            betas.append(beta)
            basis = image / beta.clamp_min(1e-30)
            history.append(basis)
    nodes, weights = [], []
    for probe in range(_PROBES):
        diagonal = torch.stack(alphas)[:, probe].double()
        off = torch.stack(betas)[:, probe].double()
        values, vectors = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
        nodes.append(values)
        weights.append(vectors[0] ** 2)
    density, order = torch.cat(nodes).clamp_min(0).sqrt().float().sort()
    cumulative = torch.cat(weights)[order].float().cumsum(0)
    wanted = (torch.arange(_QUANTILES) + 0.5) / _QUANTILES * cumulative[-1]
    right = torch.searchsorted(cumulative, wanted).clamp(1, len(density) - 1)
    # Interpolate between neighbouring nodes: the quadrature has few of them, and repeated values would stand out.
    low, high = cumulative[right - 1], cumulative[right]
    share = ((wanted - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return density[right - 1] + share * (density[right] - density[right - 1])
