"""The numbers behind exp, log and tanh for each compute dtype. Pure data; `elementary` says how they are used."""

from dataclasses import dataclass
from typing import Final

import torch


@dataclass(frozen=True)
class Format:
    """What a compute dtype needs. Polynomials, lowest power first, are near-minimax on the reduced range.

    ``ln2_high`` has so many zeros at its end that its product with any exponent is exact.
    ``exponential``: (exp(r) - 1 - r) / r² for |r| ≤ ln(2) / 2. ``logarithm``: (2 artanh(s) - 2s) / s³, in s².
    """

    mantissa: int
    bias: int
    ln2_high: float
    ln2_low: float
    inverse_ln2: float
    lowest: float
    highest: float
    tanh_is_one: float
    root_half: int
    exponential: tuple[float, ...]
    logarithm: tuple[float, ...]

    @property
    def magic(self) -> float:
        """Added to a number, it leaves the nearest integer in the last bits of the sum."""
        return 1.5 * 2.0**self.mantissa

    @property
    def magic_word(self) -> int:
        return self.word_of_power(self.mantissa) + (1 << (self.mantissa - 1))

    def word_of_power(self, exponent: int) -> int:
        """The bits of 2 ** exponent."""
        return (exponent + self.bias) << self.mantissa


FORMATS: Final = {
    torch.float32: Format(
        mantissa=23,
        bias=127,
        ln2_high=0.693145751953125,
        ln2_low=1.428606765330187e-06,
        inverse_ln2=1.4426950216293335,
        lowest=-104.0,
        highest=89.0,
        tanh_is_one=10.0,
        root_half=0x3F3504F3,
        exponential=(
            0.5,
            0.1666666716337204,
            0.04166646674275398,
            0.00833331048488617,
            0.0013933649752289057,
            0.00019890991097781807,
        ),
        logarithm=(0.6666666865348816, 0.4000012278556824, 0.2855081558227539, 0.23330582678318024),
    ),
    torch.float64: Format(
        mantissa=52,
        bias=1023,
        ln2_high=0.6931471805598903,
        ln2_low=5.497923018708371e-14,
        inverse_ln2=1.4426950408889634,
        lowest=-746.0,
        highest=710.0,
        tanh_is_one=22.0,
        root_half=0x3FE6A09E667F3BCD,
        exponential=(
            0.5,
            0.1666666666666667,
            0.04166666666666667,
            0.008333333333326136,
            0.0013888888888883748,
            0.00019841269874820627,
            2.4801587325547743e-05,
            2.7557255400206422e-06,
            2.75572736431103e-07,
            2.5105217004720745e-08,
            2.0914686968086876e-09,
        ),
        logarithm=(
            0.666666666666667,
            0.39999999999899444,
            0.2857142862600327,
            0.22222211130259878,
            0.18182889455674947,
            0.15331710618210773,
            0.14616585424888623,
        ),
    ),
}
