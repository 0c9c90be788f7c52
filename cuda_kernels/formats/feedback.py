"""Encoding under a Hessian: later blocks of a column absorb what earlier ones could not express, then all
settle."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cuda_kernels.formats import search
from cuda_kernels.formats.factors import inverse_root
from cuda_kernels.formats.layout import GROUP_SIZE
from cuda_kernels.formats.scales import Metric, Scales, choose_local


@dataclass(frozen=True, eq=False)
class Couplings:
    """What one kind of pass takes from the Hessian H [K, K]: t_I += matrix[I, J] e_J for an error e in block
    J."""

    matrix: Tensor  # f32 [K, K]
    metric: Metric


def feedback_couplings(hessian: Tensor, block: int = 4) -> Couplings:
    """Block LDLᵀ of H (LDLQ, Chee et al. 2023; GPTQ's U = chol(H⁻¹), `block` rows at a time).

    With H⁻¹ = Uᵀ U, an error e in block J costs |U_JJ⁻ᵀ e|² once all later rows answer with -U_J,restᵀ
    U_JJ⁻ᵀ e.
    """
    upper = inverse_root(hessian)
    factors = torch.linalg.inv(_diagonal(upper, block)).mT.contiguous()
    columns = upper.mT.unflatten(1, (-1, block)).transpose(0, 1)
    return Couplings(-(columns @ factors).transpose(0, 1).flatten(1), Metric(factors))


def descent_couplings(hessian: Tensor) -> Couplings:
    """Coordinate descent on eᵀ H e: with the other errors fixed, block I is best at w_I + H_II⁻¹ Σ_J H_IJ
    e_J."""
    diagonal = _diagonal(hessian)
    matrix = torch.linalg.solve(diagonal, hessian.unflatten(0, (-1, 4))).flatten(0, 1)
    _diagonal(matrix).zero_()
    return Couplings(matrix, Metric(torch.linalg.cholesky(diagonal).mT.contiguous()))


@dataclass(frozen=True, eq=False)
class Curvature:
    """A Hessian [K, K], positive definite, and what the two kinds of passes take from it."""

    hessian: Tensor
    feedback: Couplings
    descent: Couplings

    @classmethod
    def of(cls, hessian: Tensor) -> "Curvature":
        return cls(hessian, feedback_couplings(hessian), descent_couplings(hessian))


@dataclass(eq=False)
class Settler:
    """Codes and scales of rows [K, N] under a Hessian, improved pass by pass; owns all it holds."""

    rows: Tensor  # f32 [K, N], the weights
    curvature: Curvature
    book: Tensor  # f32 [256, 4]
    scales: Scales
    codes: Tensor  # int32 [K/4, N]

    def feed_back(self) -> None:
        """One pass from the first group to the last, errors pushed forward."""
        couplings = self.curvature.feedback
        errors = torch.zeros_like(self.rows)
        for start in range(0, self.rows.shape[0], GROUP_SIZE):
            group = slice(start, start + GROUP_SIZE)
            targets = self.rows[group] + couplings.matrix[group, :start] @ errors[:start]
            errors[group] = self._choose_group(couplings, group, targets, None)
        self._refit()

    def descend(self) -> None:
        """One pass of coordinate descent over the groups."""
        couplings = self.curvature.descent
        errors = self.rows - self.decode()
        for start in range(0, self.rows.shape[0], GROUP_SIZE):
            group = slice(start, start + GROUP_SIZE)
            targets = self.rows[group] + couplings.matrix[group] @ errors
            pull = (
                self.curvature.hessian[group] @ errors - self.curvature.hessian[group, group] @ errors[group]
            )
            errors[group] = self._choose_group(couplings, group, targets, pull)
        self._refit()

    def decode(self) -> Tensor:
        """The weights that codes and scales stand for, f32 [K, N]."""
        return decode(self.book, self.codes, self.scales.values)

    def loss(self) -> Tensor:
        """eᵀ H e of each column, f32 [N]."""
        error = self.rows - self.decode()
        return (error * (self.curvature.hessian @ error)).sum(dim=0)

    def _choose_group(
        self, couplings: Couplings, group: slice, targets: Tensor, pull: Tensor | None
    ) -> Tensor:
        """Pick the local scale and codes of one group; returns its errors [64, N].

        `pull` is H_g,out e_out, the rest's claim on this group, in a descent; None in a feedback pass, where
        errors are measured from the moving targets.
        """
        index, blocks = group.start // GROUP_SIZE, slice(group.start // 4, group.stop // 4)
        factors, matrix = couplings.metric.factors[blocks], couplings.matrix[group, group].contiguous()
        old = (
            None
            if pull is None
            else decode(self.book, self.codes[blocks], self.scales.values[index : index + 1])
        )
        best: list[Tensor] = []

        def cost(candidate: Scales) -> Tensor:
            moved = targets.clone()
            codes = search.sweep(moved, candidate.values[0], self.book, factors, matrix, old)
            value = decode(self.book, codes, candidate.values)
            error = (moved if pull is None else self.rows[group]) - value
            paid = self._paid(error, factors, group, pull)
            _keep_better(best, codes, error, paid)
            return paid.unsqueeze(0)

        chosen = choose_local(Scales(self.scales.local[index : index + 1], self.scales.step), cost)
        self.scales.local[index], self.codes[blocks] = chosen.local[0], best[0]
        return best[1]

    def _paid(self, error: Tensor, factors: Tensor, group: slice, pull: Tensor | None) -> Tensor:
        if pull is None:
            return Metric(factors).map_rows(error).square().sum(dim=(0, 1))
        return (error * (self.curvature.hessian[group, group] @ error + 2 * pull)).sum(dim=0)

    def _refit(self) -> None:
        """Least squares under H for the step of each column, its codes and local scales fixed."""
        levels = decode(self.book, self.codes, self.scales.local)
        weighted = self.curvature.hessian @ levels
        size = (weighted * levels).sum(dim=0)
        step = (weighted * self.rows).sum(dim=0) / size.clamp(min=1e-30)
        step = torch.where((size > 0) & (step > 0), step, self.scales.step)
        before, old = self.loss(), self.scales
        self.scales = replace(old, step=step.to(torch.bfloat16).float())
        better = self.loss() <= before
        self.scales = replace(old, step=torch.where(better, self.scales.step, old.step))


def _keep_better(best: list[Tensor], codes: Tensor, error: Tensor, paid: Tensor) -> None:
    """Keep in `best` the codes, errors and price of the cheaper candidate of each column."""
    if not best:
        best[:] = codes, error, paid
        return
    wins = paid < best[2]
    best[:] = [torch.where(wins, new, kept) for new, kept in zip((codes, error, paid), best, strict=True)]


def decode(book: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Codes [K/4, N] under scales [K/64, N], f32 [K, N]."""
    columns = codes.shape[1]
    levels = book[codes.long()].movedim(-1, 1).reshape(-1, GROUP_SIZE, columns)
    return (levels * scale.unsqueeze(1)).view(-1, columns)


def _diagonal(matrix: Tensor, size: int = 4) -> Tensor:
    """A view of the square blocks on the diagonal, [K/size, size, size]."""
    blocks = matrix.view(matrix.shape[0] // size, size, -1, size)
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
