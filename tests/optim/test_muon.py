"""Muon against float64 and against the properties it is named for."""

from __future__ import annotations

import math

import pytest
import torch

from colossus.optim.muon import COEFFICIENTS, ITERATIONS, RMS, Muon, orthogonalised


def reference(matrix: torch.Tensor) -> torch.Tensor:
    """The same iteration on the singular values alone, in float64."""
    a, b, c = COEFFICIENTS
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", [(8, 8), (16, 6), (6, 16), (1, 5)])
def test_equals_the_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = orthogonalised(matrix[None], torch.float64)[0]
    torch.testing.assert_close(found, reference(matrix), rtol=1e-9, atol=1e-9)


def test_singular_values_come_near_one() -> None:
    matrices = torch.randn(3, 32, 16, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(matrices, torch.float32))
    assert values.min() > 0.4 and values.max() < 1.3


def test_a_batch_equals_its_matrices_one_by_one() -> None:
    matrices = torch.randn(4, 12, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = orthogonalised(matrices, torch.float64)
    for matrix, found in zip(matrices, batch, strict=True):
        torch.testing.assert_close(
            found, orthogonalised(matrix[None], torch.float64)[0], rtol=1e-12, atol=1e-12
        )


def test_a_step_is_momentum_orthogonalised_and_scaled() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    weight = torch.nn.Parameter(start.clone())
    muon = Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.5, matmul_type=torch.float64)
    expected, momentum = start.clone(), torch.zeros_like(start)
    for _ in range(3):
        weight.grad = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        momentum = 0.9 * momentum + 0.1 * weight.grad
        update = reference(0.1 * weight.grad + 0.9 * momentum)
        expected = expected * (1 - 0.05 * 0.5) - 0.05 * RMS * math.sqrt(6) * update
        muon.step(0.5)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-9)
