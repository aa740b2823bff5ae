"""What a free share of a GPU is still good for, if the tasks to come pack as well as they could.

Pure. A GPU of which 530/1000 is left takes a task of 470 and wastes 60; with 190 left it is nearly lost when only tasks
of 230 and more come. `waste_table` puts numbers on that: it solves the cutting-stock problem of the fractional tasks
(fewest whole GPUs that hold them, in the proportions in which they arrive) and reads its dual prices: what one task of
each size is worth, in GPUs. The value of a free share is then the best sum of prices that fits into it, and its waste
is the share less that value.

The linear programme is solved by the revised simplex method with columns made on demand (Gilmore and Gomory, 1961): the
next pattern is the knapsack that is worth most at the prices so far. Plain Python floats, one operation after the
other, so that every machine gets the same prices; they are rounded to ppm before anything is compared with them.

Called by the packing policy when what is typical has changed. Must not look at the fleet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from fal_scheduler.core.fragmentation import PPM, WHOLE, Demand, Ints

UNIT: Final = 10  # milli; sizes are rounded up to it
_CAPACITY: Final = WHOLE // UNIT
_ROUNDS_MAX: Final = 500
_TINY: Final = 1e-9
_LEVELS_MAX: Final = 32


def prices(weight_of_size: Mapping[int, int]) -> dict[int, int]:
    """Dual prices in ppm of a GPU of sizes (units of UNIT, 1..100) that come with these weights (above 0)."""
    sizes = sorted(weight_of_size)
    count = len(sizes)
    # A basis of one pattern for each size, filled with that size alone.
    inverse = [[0.0] * count for _ in sizes]
    level = [0.0] * count
    cost = [1.0] * count
    for place, size in enumerate(sizes):
        copies = _CAPACITY // size
        inverse[place][place] = 1.0 / copies
        level[place] = weight_of_size[size] / copies
    worth = [0.0] * count
    for _ in range(_ROUNDS_MAX):
        worth = [sum(cost[row] * inverse[row][place] for row in range(count)) for place in range(count)]
        column, price = _entering(sizes, worth)
        if column is None:
            break
        _pivot(inverse, level, cost, column, price)
    return {size: max(round(worth[place] * PPM), 0) for place, size in enumerate(sizes)}


def _entering(sizes: Sequence[int], worth: Sequence[float]) -> tuple[list[float] | None, float]:
    """A column that makes the solution better and its cost: a surplus, else the best pattern; None at the optimum."""
    for place, value in enumerate(worth):
        if value < -_TINY:
            return [-1.0 if other == place else 0.0 for other in range(len(worth))], 0.0
    best = knapsack(sizes, worth)
    if best[_CAPACITY] <= 1.0 + _TINY:
        return None, 0.0
    column = [0.0] * len(sizes)
    room = _CAPACITY
    while room:
        if best[room] == best[room - 1]:
            room -= 1
            continue
        place = next(
            place for place, size in enumerate(sizes) if size <= room and best[room - size] + worth[place] == best[room]
        )
        column[place] += 1.0
        room -= sizes[place]
    return column, 1.0


def _pivot(
    inverse: list[list[float]], level: list[float], cost: list[float], column: Sequence[float], price: float
) -> None:
    """Bring the column into the basis for the one that first reaches 0; of several the first."""
    count = len(column)
    change = [sum(row[place] * column[place] for place in range(count) if column[place]) for row in inverse]
    leaving = min(
        (row for row in range(count) if change[row] > _TINY),
        key=lambda row: (level[row] / change[row], row),
        default=-1,
    )
    if leaving < 0:
        raise ArithmeticError("the cutting-stock programme has no bound")
    step = level[leaving] / change[leaving]
    new = [value / change[leaving] for value in inverse[leaving]]
    for row in range(count):
        if row != leaving and change[row]:
            inverse[row] = [old - change[row] * value for old, value in zip(inverse[row], new, strict=True)]
            level[row] = max(level[row] - change[row] * step, 0.0)
    inverse[leaving], level[leaving], cost[leaving] = new, step, price


def knapsack(sizes: Sequence[int], worth: Sequence[float]) -> list[float]:
    """The best sum of worths whose sizes fit, for each capacity 0..100; a size may be taken several times."""
    best = [0.0] * (_CAPACITY + 1)
    for room in range(1, _CAPACITY + 1):
        top = best[room - 1]
        for size, value in zip(sizes, worth, strict=True):
            if size <= room and best[room - size] + value > top:
                top = best[room - size] + value
        best[room] = top
    return best


def waste_table(typical: Sequence[tuple[Demand, int]]) -> tuple[Ints, Ints]:
    """What of a free share is lost, by CPU: (thresholds of milli-CPU, ascending; [level, share 0..1000] in ppm-milli).

    Level k is for nodes whose free CPU covers k thresholds: a size counts there as far as the tasks of that size need
    no more CPU. A wholly free GPU wastes nothing.
    """
    weights: dict[int, int] = {}
    needs: dict[int, dict[int, int]] = {}
    for task, weight in typical:
        if task.num_gpus == 1 and 0 < task.gpu_milli < WHOLE and weight > 0:
            size = -(-task.gpu_milli // UNIT)
            weights[size] = weights.get(size, 0) + weight
            by_cpu = needs.setdefault(size, {})
            by_cpu[task.cpu_milli] = by_cpu.get(task.cpu_milli, 0) + weight
    sizes = sorted(weights)
    price = prices(weights) if sizes else {}
    cpus = sorted({cpu for by_cpu in needs.values() for cpu in by_cpu})
    cpus = cpus[:: -(-len(cpus) // _LEVELS_MAX)] if cpus else []
    table = np.zeros((len(cpus) + 1, WHOLE + 1), np.int64)
    share = np.arange(WHOLE + 1, dtype=np.int64)
    for level in range(len(cpus) + 1):
        # The last level stands for "enough for everything", also where thresholds were left out.
        limit = cpus[level - 1] if level else -1
        worth = []
        for size in sizes:
            covered = sum(weight for cpu, weight in needs[size].items() if cpu <= limit or level == len(cpus))
            worth.append(price[size] * (covered / weights[size]))
        value = np.array([min(int(one), PPM) for one in knapsack(sizes, worth)], np.int64)
        table[level] = share * PPM - value[share // UNIT] * WHOLE
        table[level, WHOLE] = 0
    return np.array(cpus, np.int64), table
