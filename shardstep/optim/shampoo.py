"""Shampoo: gradients between the inverse roots of what their rows and columns have had in common, for matrices."""

from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor
from torch.optim.optimizer import ParamsT

from shardstep.optim.groups import number
from shardstep.optim.optimizer import Optimizer
from shardstep.optim.ranges import check_at_least_zero, check_matrix, refusal
from shardstep.rules.functions import identity, max_abs, maximum, norm
from shardstep.rules.language import Elements, inline, rule, state, zeros

RIDGE: Final = 1e-5
"""The least ridge, relative to the Frobenius norm. In 30,000 sums of float32, rounding made eigenvalues of -1e-6, which
Newton's iteration would blow up."""

SMALLEST: Final = 1e-30
"""What matrices are divided by at least, so that one of zeros stays so."""

SCALES: Final = (3.0, 3.0, 3.0, 3.0, 2.98, 1.93, 1.21, 1.013, 1.0)
"""For each iteration the c for which x ↦ c x (5/4 − c x/4)⁴ is largest at its least over [l, 1], where eigenvalues may
still be: l is `RIDGE` at first, and within 1e-7 of 1 at last. At most 3: the largest eigenvalues become small for a
while, and would lose digits."""

ITERATIONS: Final = len(SCALES)


@inline
def factor(m: Elements, unit: Elements, c: Elements) -> Elements:
    """The N of an iteration: Newton's for the eigenvalues of c M."""
    return 1.25 * c**0.25 * unit - 0.25 * c**1.25 * m


@inline
def nearer(m: Elements, n: Elements) -> Elements:
    """N⁴ M, which is nearer to I than M."""
    square = n @ n
    return (square @ square) @ m


@inline
def inverse_fourth_root(total: Elements, eps: Elements) -> Elements:
    """(total + ρ I)^(−1/4) with ρ = max(eps, 1e-5 ‖total‖), of a symmetric matrix without negative eigenvalues.

    The coupled Newton iteration for inverse roots (Guo & Higham 2006), scaled so that small eigenvalues grow by 7.3 and
    not by 2.4 in each: M = (total + ρ I) / (‖total‖ + ρ) goes to I by N⁴ M, and the product of the N to the root.
    """
    largest = maximum(max_abs(total), SMALLEST)
    x = total / largest
    size = norm(x)
    ridge = maximum(eps / largest, RIDGE * size)
    scale = 1 / (size + ridge)
    unit = identity(total)
    m = scale * x + scale * ridge * unit
    root = factor(m, unit, SCALES[0])
    m = nearer(m, root)
    for i in range(1, ITERATIONS):
        n = factor(m, unit, SCALES[i])
        m = nearer(m, n)
        root = n @ root
    return (scale / largest) ** 0.25 * root


@rule
def shampoo(
    param: Elements,
    grad: Elements,
    left: Elements = state(shape="row_pair"),
    right: Elements = state(shape="column_pair"),
    left_root: Elements = state(shape="row_pair"),
    right_root: Elements = state(shape="column_pair"),
    momentum_buffer: Elements = zeros,
    *,
    step: int,
    lr: float = 0.1,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    eps: float = 1e-4,
    update_freq: int = 1,
) -> tuple[Elements, ...]:
    """Gupta, Koren & Singer 2018 (arXiv 1802.09568).

    With gradient G, step count t from 1, and n × m parameters Θ; the roots are computed where t − 1 is a multiple of
    update_freq, and kept in between::

        L ← L + G Gᵀ,  R ← R + Gᵀ G
        P ← (L + ρ I)^(−1/4),  Q ← (R + σ I)^(−1/4)         ρ = max(eps, 1e-5 ‖L‖), σ = max(eps, 1e-5 ‖R‖)
        B ← μ B + P G Q
        Θ ← (1 − lr · weight_decay) Θ − lr · B

    The paper begins with L = R = eps I, which is the same but for large L and R; decay and this momentum it lacks.
    """
    left = left + grad @ grad.T
    right = right + grad.T @ grad
    if (step - 1) % update_freq == 0:
        left_root = inverse_fourth_root(left, eps)
        right_root = inverse_fourth_root(right, eps)
    update = left_root @ grad @ right_root
    if momentum != 0:
        momentum_buffer = momentum * momentum_buffer + update
        update = momentum_buffer
    param = param * (1 - lr * weight_decay) - lr * update
    return param, left, right, left_root, right_root, momentum_buffer


class Shampoo(Optimizer):
    """Shampoo for parameters of two dimensions; the others are AdamW's work: see `Combined`.

    ``params``: tensors, (name, tensor) pairs or groups. ``lr`` ≥ 0: step size; ``momentum`` in [0, 1);
    ``weight_decay`` ≥ 0: decoupled, multiplied by ``lr``; ``eps`` > 0: what L and R begin with on their diagonals;
    ``update_freq`` ≥ 1: the roots are computed anew every so many steps. State: for n × m parameters ``left`` and
    ``left_root`` (n × n), ``right`` and ``right_root`` (m × m), and with momentum ``momentum_buffer``.

    A root takes 32 products, 64 n³ floating-point operations: Newton's iteration, and no solver of eigenvalues, whose
    bits nobody fixes. So an update of a square matrix takes 136 n³, and 8 n³ in the steps between. In float32 a root is
    within 3e-5 of the exact one, in norm, for condition numbers up to 1e4, and within 3e-4 for any; what it makes of
    the gradients that L is made of, within 1e-4. A side of many thousands, as of an embedding, is for AdamW.

    Raises ConfigError for a value out of range and for a parameter that is no matrix.
    """

    rule = shampoo

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        eps: float = 1e-4,
        update_freq: int = 1,
    ) -> None:
        given = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eps": eps, "update_freq": update_freq}
        super().__init__(params, **given)

    def check_parameter(self, param: Tensor, where: str) -> None:
        check_matrix(param, where, "Shampoo")

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        check_at_least_zero(group, where, "lr", "weight_decay")
        if not 0.0 <= number(group["momentum"], "momentum", where) < 1.0:
            raise refusal("0 ≤ momentum < 1", where, group["momentum"])
        if not 0.0 < number(group["eps"], "eps", where) < 1e6:
            raise refusal("0 < eps < 1e6", where, group["eps"])
        freq = group["update_freq"]
        if isinstance(freq, bool) or not isinstance(freq, int) or freq < 1:
            raise refusal("a whole update_freq ≥ 1", where, repr(freq))
