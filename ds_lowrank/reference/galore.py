"""GaLore as arXiv 2403.03507, Algorithm 2, writes it: dense, one process.

    every T steps    Q <- leading right singular vectors of H; or another basis
    R <- H Q
    N <- Adam(R)     (or another inner optimizer)
    W <- W - lr * scale * N Q^T - lr * weight_decay * W

H is G, or G^T if the rows are compressed: kept x compressed. Q is compressed x r. The bases, which references share,
are also here.
"""

from __future__ import annotations

import torch

from ds_lowrank.reference.inner import AdamW, make_inner
from ds_lowrank.reference.sketch import sketch


def positive_qr(matrix: torch.Tensor) -> torch.Tensor:
    """The orthonormal factor of the QR decomposition whose R has a positive diagonal; it is unique."""
    q: torch.Tensor
    q, r = torch.linalg.qr(matrix)
    return q * torch.sign(torch.diagonal(r))


def compresses_columns(proj_type: str, m: int, n: int) -> bool:
    """Whether the columns of an m x n matrix are compressed, and not its rows."""
    return {"std": m >= n, "reverse_std": m < n, "right": True, "left": False}[proj_type]


def singular_basis(G: torch.Tensor, rank: int, right: bool) -> torch.Tensor:
    """The leading right singular vectors of G, or the left ones: compressed x rank."""
    U: torch.Tensor
    Vh: torch.Tensor
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return Vh[:rank].T if right else U[:, :rank]


def randomized_basis(H: torch.Tensor, W: torch.Tensor, power_steps: int = 1) -> torch.Tensor:
    """Range finder: a basis of ``(H^T H)^q W``, compressed x k, or without power steps of ``H^T W``.

    The sketch W is compressed x k, without power steps kept x k.
    """
    W = W.to(H.dtype)
    if power_steps == 0:
        return positive_qr(H.T @ W)
    for _ in range(power_steps):
        W = positive_qr(H.T @ positive_qr(H @ W))
    return W


def leading_basis(G: torch.Tensor, W: torch.Tensor, right: bool, projector: str) -> torch.Tensor:
    """A basis of G's leading subspace, compressed x r: singular vectors for ``svd``, else from W, of the same shape."""
    return singular_basis(G, W.shape[1], right) if projector == "svd" else randomized_basis(G if right else G.T, W)


def sampled_basis(G: torch.Tensor, rank: int, right: bool, z: torch.Tensor) -> torch.Tensor:
    """Singular vectors drawn one after the other, each with a probability proportional to its singular value.

    A race: the one whose clock, of a rate of its singular value, rings next is drawn next. The ``|z|^2 / 2`` of pairs
    of normal numbers, min(m, n) x 2, are clocks of rate 1.
    """
    U, s, Vh = torch.linalg.svd(G, full_matrices=False)
    rings = z.to(G.dtype).square().sum(1) / 2 / s
    first = sorted(sorted(range(len(s)), key=lambda i: rings[i].item())[:rank])
    vectors: torch.Tensor = Vh[first].T if right else U[:, first]
    return vectors


def dct_basis(H: torch.Tensor, rank: int) -> torch.Tensor:
    """The columns D_j of the orthonormal DCT-II matrix with the largest ``|H D_j|``: compressed x r."""
    n = H.shape[1]
    j, i = torch.meshgrid(torch.arange(n).double(), torch.arange(n).double(), indexing="ij")
    D = (2 / n) ** 0.5 * torch.cos(torch.pi * i * (2 * j + 1) / (2 * n))
    D[:, 0] *= 0.5**0.5
    norms = (H @ D.to(H.dtype)).norm(dim=0)
    strongest = sorted(range(n), key=lambda column: -norms[column].item())[:rank]
    columns: torch.Tensor = D[:, sorted(strongest)].to(H.dtype)
    return columns


class DenseGaLore:
    """GaLore on one matrix.

    Args:
        weight: m x n, changed in place.
        name: of the matrix; sketches derive from it.
        lr: the learning rate of a step that is given none.

    The other arguments are the options of :class:`ds_lowrank.GaLore`, by the same names.
    """

    basis: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        name: str = "w",
        lr: float = 1e-2,
        rank: int = 4,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        projector: str = "randomized",
        power_steps: int = 1,
        first_basis: str = "gradient",
        moments: str = "keep",
        inner: str = "adamw",
        momentum: float = 0.0,
        lion_sign: str = "subspace",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        eps_root: str = "corrected",
        weight_decay_order: str = "before",
        cos_threshold: float | None = None,
        gamma_proj: int = 2,
        queue_size: int = 5,
        seed: int = 0,
    ) -> None:
        m, n = weight.shape
        self.weight, self.name, self.lr, self.gap, self.scale = weight, name, lr, update_proj_gap, scale
        self.rank, self.projector, self.moments = min(rank, m, n), projector, moments
        self.first_basis, self.power_steps = first_basis, power_steps
        self.decays_after = weight_decay_order == "after"
        self.weight_decay, self.seed, self.t = weight_decay, seed, 0
        self.threshold, self.growth, self.patience = cos_threshold, gamma_proj, queue_size
        self.next_refresh = self.in_a_row = 0
        self.right = compresses_columns(proj_type, m, n)
        self.inner = make_inner(inner, betas, eps, momentum, lion_sign, eps_root)

    def find_basis(self, G: torch.Tensor) -> torch.Tensor:
        """A basis of the gradient, compressed x r, or a random one."""
        H = G if self.right else G.T
        if self.projector == "random" or (self.t == 0 and self.first_basis == "random"):
            return positive_qr(sketch(self.seed, self.name, self.t, H.shape[1], self.rank).to(G.dtype))
        if self.projector == "dct":
            return dct_basis(H, self.rank)
        if self.projector == "svd":
            return singular_basis(G, self.rank, self.right)
        if self.projector == "sampled":
            z = sketch(self.seed, self.name, f"sample {self.t}", min(G.shape), 2)
            return sampled_basis(G, self.rank, self.right, z)
        W = sketch(self.seed, self.name, self.t, H.shape[1 if self.power_steps else 0], self.rank)
        return randomized_basis(H, W, self.power_steps)

    def is_due(self, G: torch.Tensor) -> bool:
        """Whether there is a new basis in this step. A gradient of zeros has no subspace: the old one stays."""
        due = self.t == self.next_refresh
        if due and self.t > 0 and not G.any() and self.projector != "random":
            self.next_refresh += self.gap if self.threshold is None else 1
            return False
        return due

    def compare(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """Let bases last longer if so many in a row had so much of the one before (Q-GaLore, arXiv 2407.08296)."""
        assert self.threshold is not None
        overlap = (old.T @ new).square().sum() / new.square().sum()
        self.in_a_row = self.in_a_row + 1 if overlap >= self.threshold else 0
        if self.in_a_row == self.patience:
            self.gap, self.in_a_row = self.gap * self.growth, 0

    def refresh(self, G: torch.Tensor) -> None:
        """Find a new basis, decide how long it lasts, and carry the moments into it if asked."""
        new = self.find_basis(G)
        if self.t > 0 and self.threshold is not None:
            self.compare(self.basis, new)
        self.next_refresh = self.t + self.gap
        if self.moments == "rotate" and self.t > 0:
            self.inner.rotate(self.basis.T @ new)
        self.basis = new

    def update(self, H: torch.Tensor) -> torch.Tensor:
        """What the learning rate multiplies, kept x compressed."""
        return self.scale * self.inner.update(H @ self.basis, self.basis)

    def step(self, G: torch.Tensor, lr: float | None = None) -> None:
        """Take one step on the gradient G, m x n."""
        lr = self.lr if lr is None else lr
        H, W = (G, self.weight) if self.right else (G.T, self.weight.T)
        if self.is_due(G):
            self.refresh(G)
        kept, update = 1 - lr * self.weight_decay, self.update(H)
        if self.decays_after:
            W.sub_(lr * update).mul_(kept)
        else:
            W.mul_(kept).sub_(lr * update)
        self.t += 1


class DenseAdamW:
    """AdamW (Loshchilov and Hutter, Algorithm 2) on one tensor, for everything that is not projected.

    Args:
        weight: of any shape, changed in place.
        lr: the learning rate of a step that is given none.
        betas: of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        eps_root: ``corrected``, or ``uncorrected`` as in transformers.
        weight_decay_order: whether weights decay ``before`` or ``after`` the update.

    Any other option is a method's and ignored.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        eps_root: str = "corrected",
        weight_decay_order: str = "before",
        **_: object,
    ) -> None:
        self.weight, self.lr, self.weight_decay = weight, lr, weight_decay
        self.decays_after, self.adam = weight_decay_order == "after", AdamW(betas, eps, eps_root)

    @property
    def t(self) -> int:
        """The number of steps so far."""
        return self.adam.t

    def step(self, G: torch.Tensor, lr: float | None = None) -> None:
        """Take one step on the gradient G, of the weight's shape."""
        lr = self.lr if lr is None else lr
        kept, direction = 1 - lr * self.weight_decay, self.adam.direction(G)
        if self.decays_after:
            self.weight.sub_(lr * direction).mul_(kept)
        else:
            self.weight.mul_(kept).sub_(lr * direction)
