"""How near the encoders come, on weights and Hessians whose figures are known; both search paths alike."""

import pytest
import torch

from cuda_kernels.formats import ccq, factors, search, trellis, wint2, wint2t, wint4
from cuda_kernels.formats.codebooks import CODEBOOKS
from cuda_kernels.formats.encoder import damp

BOOK = ccq.codebook(*CODEBOOKS[0])


def gaussian(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def relative_error(module, weight, **options):
    """(plain, under the Hessian) squared error, relative."""
    decoded = module.dequantize(*module.quantize(weight, **options).tensors().values()).float()
    hessian = options.get("hessian", torch.eye(len(weight)))
    error = weight - decoded
    return [
        float((part * (matrix @ part)).sum() / (weight * (matrix @ weight)).sum())
        for part, matrix in ((error, torch.eye(len(weight))), (error, hessian))
    ]


def uneven_hessian(rows):
    """Second moments of correlated inputs, some of them never seen."""
    inputs = gaussian(4 * rows, rows, seed=1) * torch.logspace(0, -1.5, rows)
    inputs = inputs @ torch.linalg.qr(gaussian(rows, rows, seed=2))[0]
    inputs[:, :3] = 0
    return inputs.T @ inputs


@pytest.mark.parametrize(("effort", "most"), [("fast", 0.1055), ("normal", 0.1015), ("best", 0.0990)])
def test_wint2_on_gaussian_weights(effort, most):
    assert relative_error(wint2, gaussian(512, 32), effort=effort)[0] < most


@pytest.mark.parametrize("has_reference", [False, True])
def test_both_sweeps_of_levels_choose_alike(has_reference):
    targets, coupling = gaussian(64, 70), 0.05 * gaussian(64, 64, seed=1)
    reference = gaussian(64, 70, seed=3) if has_reference else None
    scale = torch.full((70,), 0.3)
    scale[3] = 0
    moved, expected = targets.clone(), targets.clone()
    found = search.sweep_levels(moved, scale, coupling, reference, 7)
    wanted = search._sweep_levels_torch(expected, scale, coupling, reference, 7)
    assert (found == wanted).float().mean() > 0.98
    same = (found == wanted).all(dim=0)
    assert same.sum() > 60
    assert torch.allclose(moved[:, same], expected[:, same], atol=1e-4)


def test_the_highest_effort_mirrors_codebooks_by_negative_super_scales():
    assert set(wint2.quantize(gaussian(512, 32), effort="best").super_scales.sign().tolist()) == {-1, 1}


def test_wint4_gains_from_feedback_too():
    weight, hessian = gaussian(128, 32), uneven_hessian(128)
    stored = [wint4.quantize(weight), wint4.quantize(weight, hessian=hessian)]
    errors = [weight - wint4.dequantize(one.quant_weight, one.weight_scale).float() for one in stored]
    plain, fed_back = ((error * (hessian @ error)).sum() for error in errors)
    assert fed_back < plain / 3.5


def test_wint2_gains_from_feedback_what_the_hessian_offers():
    weight, hessian = gaussian(256, 64), uneven_hessian(256)
    plain = wint2.dequantize(*wint2.quantize(weight).tensors().values()).float() - weight
    blind = float((plain * (hessian @ plain)).sum() / (weight * (hessian @ weight)).sum())
    assert relative_error(wint2, weight, hessian=hessian)[1] < 0.5 * blind


def test_an_identity_hessian_changes_nothing_much():
    weight = gaussian(256, 64)
    assert (
        relative_error(wint2, weight, hessian=torch.eye(256))[0]
        < 1.02 * relative_error(wint2, weight, effort="fast")[0]
    )


def test_natural_and_shuffled_order_are_equally_good():
    weight = gaussian(256, 64)
    found = wint2.quantize(weight, k_order="natural")
    decoded = wint2.dequantize(*found.tensors().values(), k_order="natural").float()
    assert (weight - decoded).square().mean() < 0.11


def test_scale_is_free():
    weight = gaussian(128, 16)
    small, large = (wint2.quantize(weight * 2.0**power) for power in (-12, 12))
    assert torch.equal(small.quant_weight, large.quant_weight)
    assert torch.equal(small.super_scales.float() * 2**24, large.super_scales.float())


def test_both_searches_choose_alike():
    targets = gaussian(8, 100).view(2, 4, 100) * 15
    books = torch.stack([BOOK, BOOK * 1.1])
    compiled, plain = search.nearest(targets, books), search._nearest_torch(targets, books)
    assert (compiled.found == plain.found).float().mean() > 0.99  # sums are rounded in another order
    assert torch.allclose(compiled.score, plain.score, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("has_reference", [False, True])
def test_both_sweeps_choose_alike(has_reference):
    targets, coupling = gaussian(64, 70), 0.05 * gaussian(64, 64, seed=1)
    factors = torch.eye(4).expand(16, 4, 4) + 0.1 * gaussian(64, 4, seed=2).view(16, 4, 4)
    reference = gaussian(64, 70, seed=3) if has_reference else None
    scale = torch.full((70,), 0.06)
    moved, expected = targets.clone(), targets.clone()
    found = search.sweep(moved, scale, BOOK, factors, coupling, reference)
    wanted = search._sweep_torch(expected, scale, BOOK, factors, coupling, reference)
    assert (found == wanted).float().mean() > 0.98  # a tie decided differently moves what comes after it
    same = (found == wanted).all(dim=0)
    assert torch.allclose(moved[:, same], expected[:, same], atol=1e-4)


def test_viterbi_finds_the_best_of_all_short_paths():
    targets, weights, start = (
        gaussian(4, 3) * 147,
        torch.tensor([1.0, 2.0, 0.5, 1.0]),
        torch.tensor([0, 77, 65535]),
    )
    paths = torch.cartesian_prod(*[torch.arange(4)] * 4).T
    for column in range(3):
        visited = trellis.states(paths, start[column].expand(256))
        errors = (targets[:, column : column + 1] - trellis.level(visited)).square() * weights.unsqueeze(1)
        best = paths[:, errors.sum(dim=0).argmin()]
        for find in (trellis.viterbi, trellis._viterbi):
            found = find(targets[:, [column]], weights, start[[column]])[:, 0]
            assert torch.equal(found.long(), best)


def test_wint2t_on_gaussian_weights():
    assert relative_error(wint2t, gaussian(128, 8), effort="fast")[0] < 0.08


def test_wint2t_gains_from_feedback():
    weight, hessian = gaussian(128, 4), uneven_hessian(128)
    blind = wint2t.dequantize(*wint2t.quantize(weight).tensors().values()).float() - weight
    unaided = float((blind * (hessian @ blind)).sum() / (weight * (hessian @ weight)).sum())
    assert relative_error(wint2t, weight, hessian=hessian)[1] < 0.8 * unaided


@pytest.mark.parametrize("rows", [100, 320])
def test_factors_of_a_hessian_are_the_same_on_any_number_of_threads(rows):
    hessian, before, found = damp(uneven_hessian(rows)), torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            found.append((factors.cholesky(hessian), factors.inverse_root(hessian)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))
    lower, upper = (factor.double() for factor in found[0])
    assert torch.allclose(lower @ lower.T, hessian.double(), rtol=1e-5, atol=1e-5 * float(hessian.max()))
    assert torch.allclose(upper.T @ upper @ hessian.double(), torch.eye(rows).double(), atol=1e-3)
    assert torch.equal(lower, lower.tril())
    assert torch.equal(upper, upper.triu())
