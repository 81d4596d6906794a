"""Stochastic rounding: what is stored in ``param`` becomes one of its two neighbours in the 16-bit dtype of ``param``.

before      %0 = load param : real element          after, for bfloat16, but for the noise %9
            %1 = load grad : real element                       %10 = bits %2 : word element
            %2 = sub %0 %1 : real element                       %11 = word_add %10 %9 : word element
            store param %2                                      %12 = const 4294901760 : word uniform
                                                                %13 = word_and %11 %12 : word element
                                                                %14 = from_bits %13 : real element
                                                                %15 = ne %2 %2 : bool element
                                                                %16 = where %15 %2 %14 : real element
                                                                store param %16

The 16 bits that bfloat16 has not are dropped, after as many random ones were added to them: the value moves away from
zero with a probability that is exactly the part of the way that it lies there, so its expectation is itself. It is
symmetric in the sign; what bfloat16 can hold stays as it is, with infinities, NaNs and the signs of zeros. A value
between the largest finite number and the power of two above it becomes infinite with the probability of reaching that.
The store that follows then has nothing to round, and everything else in the rule sees the value from before.

float16 drops 13 bits. Its denormals have fewer to drop, so 2^-14 is added meanwhile, which rounds what lies below
2^-37; values from 2^16 are infinite.

The noise is a bijection of 32-bit words, of the place's low word, mixed with one half of the key before and one in
the middle: multiplication and shifts as in Wellons' hash "lowbias32", of which the upper bits are taken. So under all
keys each element gets each noise equally often, and so do 2^32 elements under one key. Correlations between elements
are below 0.002 at all distances that were tried, but for those 2^31 + 2^15 places apart (0.2).
"""

from dataclasses import replace
from typing import Final

import torch

from shardstep.rules.ir import Builder, Hyper, Program
from shardstep.rules.noise import KEY, PIECES

_DROPPED: Final = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of a float32 that these have not."""

_LEAST_NORMAL: Final = 2.0**-14
"""Of float16."""

_SIGN: Final = 0x8000_0000


def round_stochastically(program: Program, dtype: torch.dtype) -> Program:
    """Round the new param to ``dtype``, bfloat16 or float16; the compute dtype is float32.

    A ``hyper rounding_key`` is added: see `noise`.
    """
    program = replace(program, hypers=(*program.hypers, Hyper(KEY, PIECES)))
    builder = Builder(program.shapes)
    for line in program.instructions:
        builder.copy(line, line.arguments)
    write = _Writer(builder)
    stores = [(name, write.rounded(new, dtype) if name == "param" else new) for name, new in program.stores]
    return program.with_instructions(builder.instructions, stores)


class _Writer:
    """Appends to what is built so far."""

    def __init__(self, builder: Builder) -> None:
        self._builder = builder

    def rounded(self, value: int, dtype: torch.dtype) -> int:
        """The neighbour of ``value`` that the noise chooses."""
        move = self._bfloat16 if dtype == torch.bfloat16 else self._float16
        return self._do("where", self._do("ne", value, value), value, move(value))

    def _bfloat16(self, value: int) -> int:
        return self._dropped(value, _DROPPED[torch.bfloat16])

    def _float16(self, value: int) -> int:
        size, least = self._do("abs", value), self._builder.constant(_LEAST_NORMAL)
        raise_by = self._do("where", self._do("lt", size, least), least, self._builder.constant(0.0))
        moved = self._do("sub", self._dropped(self._do("add", size, raise_by), _DROPPED[torch.float16]), raise_by)
        sign = self._do("word_and", self._do("bits", value), self._word(_SIGN))
        return self._do("from_bits", self._do("word_or", self._do("bits", moved), sign))

    def _dropped(self, value: int, count: int) -> int:
        """Without its last bits, to which noise was added: the bits of a float count its magnitude."""
        raised = self._do("word_add", self._do("bits", value), self._shift("word_shr", self._noise(), 32 - count))
        return self._do("from_bits", self._do("word_and", raised, self._word(2**32 - 2**count)))

    def _noise(self) -> int:
        word = self._do("word_xor", self._builder.emit("index"), self._key(0))
        word = self._folded(word, 16)
        word = self._do("word_mul", word, self._word(0x7FEB_352D))
        word = self._do("word_xor", word, self._key(1))
        word = self._folded(word, 15)
        return self._do("word_mul", word, self._word(0x846C_A68B))

    def _key(self, half: int) -> int:
        """32 of its bits, from two entries. What else is in an entry's bits is the same for all keys."""
        upper, lower = (self._do("bits", self._builder.hyper(KEY, 2 * half + entry)) for entry in (0, 1))
        return self._do("word_xor", self._shift("word_shl", upper, 16), lower)

    def _folded(self, word: int, count: int) -> int:
        return self._do("word_xor", word, self._shift("word_shr", word, count))

    def _shift(self, operation: str, word: int, count: int) -> int:
        return self._builder.emit(operation, word, attributes=(count,))

    def _word(self, value: int) -> int:
        return self._builder.constant(value, "word")

    def _do(self, operation: str, *arguments: int) -> int:
        return self._builder.emit(operation, *arguments)
