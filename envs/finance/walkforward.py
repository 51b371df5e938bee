"""Walk-forward evaluation: train, validate, trade a block, roll on, with positions carried over."""

from __future__ import annotations

from dataclasses import dataclass

from mobula.errors import ConfigError


@dataclass(frozen=True)
class Window:
    """Index ranges [start, stop) of one roll, in order and apart: train, an embargo, validation, trade."""

    train: tuple[int, int]
    validation: tuple[int, int]
    trade: tuple[int, int]

    def __post_init__(self) -> None:
        ranges = (self.train, self.validation, self.trade)
        if any(stop <= start for start, stop in ranges):
            raise ConfigError(f"a walk-forward window has an empty range: {ranges}")
        if self.train[1] > self.validation[0] or self.validation[1] > self.trade[0]:
            raise ConfigError(f"walk-forward ranges overlap or are out of order: {ranges}")


def windows(
    bars: int,
    *,
    first: int,
    block: int = 63,
    validation: int = 63,
    embargo: int = 0,
    sliding: int | None = None,
) -> list[Window]:
    """The rolls over `bars` bars: train [0, i - b - v - e), validation [i - b - v, i - b), trade [i - b, i) for i = first + b + v, ...

    first       bars of the first training range (and embargo)
    block       bars traded before the next roll (b); a last block that is not whole is left out
    validation  bars of a validation range (v)
    embargo     bars between training and validation (e), where labels overlap
    sliding     length of the training range; None: it begins at 0 and expands

    Raises ConfigError where b or v is longer than the data, or a range would be empty.
    """
    for name, value in (("block", block), ("validation", validation), ("first", first)):
        if value < 1:
            raise ConfigError(f"walk-forward: {name} is {value}; at least 1 bar is needed")
    if embargo < 0 or (sliding is not None and sliding < 1):
        raise ConfigError("walk-forward: embargo is at least 0 and a sliding range at least 1 bar")
    if first + validation + block > bars:
        raise ConfigError(
            f"walk-forward: {first} training + {validation} validation + {block} trading bars are more than the {bars} there"
            " are: shorten them or lengthen the range"
        )
    found = []
    for i in range(first + block + validation, bars + 1, block):
        stop = i - block - validation - embargo
        begin = 0 if sliding is None else max(0, stop - sliding)
        found.append(Window((begin, stop), (i - block - validation, i - block), (i - block, i)))
    return found
