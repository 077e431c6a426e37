"""Fill the hole that removing singular components leaves, and move it elsewhere
(docs/security.md, "The published split leaks its own secret").

W - U_k S_k V_k^T has an exact null space: the protected subspace itself, which survives quantisation. Two steps:

1. *Fill.* W' = W - U_k (S_k - M) V_k^T, with a secret random core M whose singular values lie between those of the
   residual. W' has full rank and nothing unusual in its spectrum. But its planted singular vectors still span U_k and
   V_k, and show by their shape: leading singular vectors are heavy-tailed.
2. *Swap.* The edge gets S_L W' S_R, where S_R exchanges V_k with as many random directions G_R of the bulk, and S_L
   does the same for U_k and G_L. Singular values stay; the planted singular vectors become random directions; and V_k,
   where random directions used to be, is spread over all singular vectors as a random subspace is.

Swapping costs rank: the trusted part's columns span U_k, W' G_R and G_L, which is 3k. Seven in ten of G_L are therefore
chosen in the span of W' G_R, which leaves 2.3k, 37 for k = 16. An image under W' leans to large singular values; so the
directions of G_R it is the image of lean away from them, and both end up about as flat as random ones.
`docs/security.md` has what detectors find.
"""

from __future__ import annotations

import torch

from sliplm.split import secret
from sliplm.split.factors import Factors


def trusted_rank(rank: int, rows: int, columns: int, camouflage: bool) -> int:
    """The rank of the trusted part of a (rows, columns) matrix of which `rank` singular components are protected."""
    rank = min(rank, rows, columns)
    swapped, shared = _counts(rank, rows, columns)
    return rank + 2 * swapped - shared if camouflage else rank


def low_rank(weight: torch.Tensor, factors: Factors, camouflage: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The trusted part A B of `weight` (N, K) with its leading `factors`: A (N, r), B (r, K), float32, `rounded` if
    camouflaged.

    r is `trusted_rank`. Without camouflage it is the paper's plain truncated SVD, whose residual gives the subspace
    away.
    """
    if not camouflage:
        return factors.u * factors.s, factors.vt.clone()
    if len(weight) > weight.shape[1]:  # images are taken from the longer side: they would stand out on it
        b, a = low_rank(weight.T, Factors(factors.vt.T, factors.s, factors.u.T, factors.rest), True)
        return a.T.contiguous(), b.T.contiguous()
    # Singular vectors from a sketch are approximate; these satisfy W V = U S exactly. The weakest come first: they are
    # the ones whose places are shared.
    u, s, turn = torch.linalg.svd((weight @ factors.vt.T).double(), full_matrices=False)
    v = (factors.vt.T.double() @ turn.T).flip(1).float()
    u, s = u.flip(1).float(), s.flip(0)
    size = len(s)
    planted = random_orthogonal(size) * between(factors.rest, size) @ random_orthogonal(size)
    core = (torch.diag(s) - planted).float()
    filled = torch.addmm(weight, u @ core, v.T, alpha=-1)  # W'
    swapped, shared = _counts(size, *weight.shape)
    away = secret.normal(len(v), shared).float()
    away -= v @ (v.T @ away)
    away = (float(s[0]) ** 2 or 1.0) * away - filled.T @ (filled @ away)
    right = _outside(v, away, swapped)
    left = _outside(u, filled @ right[:, :shared], swapped)
    across, down = v[:, :swapped] - right, u[:, :swapped] - left  # S_R = I - across across^T, S_L = I - down down^T
    # S_L W' S_R = W' - moved across^T - down back
    moved = filled @ across
    back = down.T @ filled - (down.T @ moved) @ across.T
    # The shared columns of `moved`, W' V - W' G_R = U planted - G_L image, lie in the spans of U and `down`.
    image = left[:, :shared].T @ (filled @ right[:, :shared])
    onto = planted[:, :shared].float()
    onto[:shared] -= image
    back[:shared] += image @ across[:, :shared].T
    a = torch.cat([u, moved[:, shared:], down], 1)
    return rounded(a, torch.cat([core @ v.T + onto @ across[:, :shared].T, across[:, shared:].T, back]))


def rounded(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """To numbers that bfloat16 can hold: the edge's part takes up the difference, so nothing is lost, and the trusted
    side reads half the memory per token. What it adds to the edge's part is below 2^-8 of the trusted part, where the
    residual's own singular values are far above that. A plain split is not rounded: that would half hide its exact
    null space, and it is there to show it."""
    return a.bfloat16().float(), b.bfloat16().float()


def between(values: torch.Tensor, count: int) -> torch.Tensor:
    """`count` secret float64 numbers spread like the 1-D tensor `values`, none equal to one of them.

    Singular values repel each other, so drawing them with repetition would mark the planted ones as twins.
    """
    ordered = values.double().sort().values
    if len(ordered) < 2:
        return ordered[torch.zeros(count, dtype=torch.long)]
    # A random order of the gaps between neighbours; only a matrix with few of them uses one twice.
    gap = secret.normal(len(ordered) - 1).argsort().repeat(-(-count // (len(ordered) - 1)))[:count]
    place = 0.25 + 0.5 * torch.special.ndtr(secret.normal(count))
    planted: torch.Tensor = ordered[gap] + place * (ordered[gap + 1] - ordered[gap])
    return planted


def random_orthogonal(size: int) -> torch.Tensor:
    """A secret Haar-distributed orthogonal matrix, float64 (Mezzadri, Notices of the AMS 2007: QR, signs of diag R)."""
    q, r = torch.linalg.qr(secret.normal(size, size))
    turned: torch.Tensor = q * torch.sign(torch.diagonal(r))
    return turned


def _counts(rank: int, rows: int, columns: int) -> tuple[int, int]:
    """How many of `rank` directions are swapped: all, if the matrix has as many others; and how many share places."""
    swapped = min(rank, min(rows, columns) - rank)
    return swapped, 7 * swapped // 10


def _outside(basis: torch.Tensor, first: torch.Tensor, count: int) -> torch.Tensor:
    """`count` orthonormal directions outside the span of the orthonormal `basis` (n, k): those of `first` (n, f), then
    secret random ones; float32 (n, count)."""
    basis = basis.double()
    other = torch.cat([first.double(), secret.normal(len(basis), count - first.shape[1])], 1)
    for _ in range(2):  # Gram-Schmidt, twice for full precision
        other = torch.linalg.qr(other - basis @ (basis.T @ other))[0]
    return other.float()
