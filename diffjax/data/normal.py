"""Standard normal values from raw random words, the same with every version of numpy.

The method is the ziggurat of Marsaglia and Tsang (J. Stat. Software 5(8), 2000): f(x) = exp(-x^2 / 2) is covered by 256
layers of equal area. With widths x_1 < ... < x_255 = R, the lowest layer, number 0, being R wide and having the tail,

    f(x_i) = f(x_{i+1}) + AREA / x_{i+1},      x_0 = AREA / f(R)                                          (1)

A word of 32 bits gives a layer i (8 bits), a sign (1 bit) and u (23 bits), and x = u x_i / 2^23 is taken when it lies
under the layer above too: u < 2^23 x_{i-1} / x_i. Else more words decide: in the wedge beside the layer above by
comparison with f(x), in the lowest layer by draws from the tail beyond R (Marsaglia 1964). The words are used in the
order in which numpy 2 uses them for float32 values, and the values are the same: models were trained on them.
"""

import math

import numpy as np

LAYERS, BITS = 256, 23
R = 3.6541528853610088
AREA = 0.00492867323399
AHEAD = 64  # words beyond those that are likely to be needed


def _widths() -> np.ndarray:
    """x_0, ..., x_255 of (1), float64."""
    widths = [R]
    while len(widths) < LAYERS - 1:
        last = widths[-1]
        widths.append(math.sqrt(-2 * math.log(math.exp(-last * last / 2) + AREA / last)))
    return np.array([AREA / math.exp(-R * R / 2), *widths[::-1]])


WIDTHS = _widths()
STEPS = (WIDTHS / 2**BITS).astype(np.float32)
BOUNDS = np.rint(2**BITS * np.array([R, 0.0, *WIDTHS[1:-1]]) / WIDTHS).astype(np.uint32)
HEIGHTS = np.exp(-0.5 * np.array([0.0, *WIDTHS[1:]]) ** 2).astype(np.float32)
TAIL, INVERSE = np.float32(R), np.float32(1 / R)


def standard_normal(generator: np.random.Philox, shape: tuple[int, ...]) -> np.ndarray:
    """Values float32 of a shape, from the words that follow in `generator`; it is left anywhere beyond them."""
    wanted, count = math.prod(shape), 0
    found, words = [np.empty(0, np.float32)], np.empty(0, np.uint32)
    while count < wanted:
        missing = wanted - count
        raw = generator.random_raw((missing + missing // 32 + AHEAD) // 2)
        words = np.concatenate([words, raw.astype("<u8").view("<u4")])
        values, used = _values(words)
        found.append(values)
        count, words = count + len(values), words[used:]
    return np.concatenate(found)[:wanted].reshape(shape)


def _values(words: np.ndarray) -> tuple[np.ndarray, int]:
    """The values that uint32 words give, as far as they reach, and how many of them were used."""
    layers, u = (words & np.uint32(LAYERS - 1)).astype(np.int64), words >> np.uint32(9)
    x = u.astype(np.float32) * STEPS[layers]
    np.negative(x, where=(words >> np.uint32(8) & np.uint32(1)).astype(bool), out=x)
    starts = np.flatnonzero(u >= BOUNDS[layers])
    taken = _in_wedge(layers[starts], _fraction(words[np.minimum(starts + 1, len(words) - 1)]), x[starts])
    dropped: list[int] = []  # words that are no values
    place = 0
    for start, lowest, wedge in zip(starts.tolist(), (layers[starts] == 0).tolist(), taken.tolist()):
        if start < place:  # a word that a decision before it used
            continue
        place = start + 2
        if lowest:
            x[start], place = _in_tail(words, start)
        elif not wedge:
            dropped.append(start)
        if place > len(words):
            return np.delete(x[:start], [word for word in dropped if word < start]), start
        dropped += range(start + 1, place)
    return np.delete(x, dropped), len(words)


def _in_wedge(layers: np.ndarray, fractions: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Whether points of layers 1 and above, beside the layer above them, lie under f; bool [n]."""
    above, below = HEIGHTS[layers - 1], HEIGHTS[layers]  # of layer 0 this is no question
    return (above - below) * fractions + below < np.exp(-0.5 * np.square(x.astype(np.float64)))


def _in_tail(words: np.ndarray, start: int) -> tuple[np.float32, int]:
    """A value beyond R, whose sign is another bit of the word `start`, and the place of the next unused word.

    The place lies beyond the end when words are lacking. The logarithms are rounded from float64, where numpy takes
    those that the C library has for float32: they can be one unit in the last place apart.
    """
    for place in range(start + 1, len(words) - 1, 2):
        a, b = (np.float32(-math.log1p(-float(_fraction(word)))) for word in words[place : place + 2])
        beyond = INVERSE * a
        if b + b > beyond * beyond:
            return (-(TAIL + beyond) if int(words[start]) >> 17 & 1 else TAIL + beyond), place + 2
    return np.float32(0), len(words) + 1


def _fraction(words: np.ndarray) -> np.ndarray:
    """The upper 24 bits of words as numbers in [0, 1)."""
    return (words >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)
