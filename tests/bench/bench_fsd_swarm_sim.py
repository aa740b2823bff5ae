"""`fsd-swarm-sim`: a large swarm in virtual time, with the production decisions; wall ÷ the bound, bytes that cross.

1,000 nodes in 4 regions want one 24 GB checkpoint, cut in 715 pieces of 32 MiB (larger than real ones, which is harder:
whole pieces are passed on). Links of 5 Gbit/s each way, 50 ms between regions; an origin of 5 Gbit/s. Ours: when the
last node is complete. The baseline is the bound max(F / B_origin, F / B_node): nobody can be faster, and only where
every uplink is busy all the time, since N - 1 of N copies come from peers. Twice: undisturbed, and with 10 % of the
nodes dying on the way. Bytes that enter a region are divided by regions · F (the origin lies outside all of them).

Nothing is timed but the run itself: the figures are the same on every machine.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from random import Random

from harness import Options, Result, print_table, significant

sys.path.insert(0, str(Path(__file__).parents[1]))
from sim.swarm_world import World

MUST_REACH = "crossing <= 1.05 (regions x F), origin <= 1.02 F; with deaths 1.1, 1.05; wall <= 2.3 bounds in both"
REGIONS = 4
RATE = 625e6
PIECE_BYTES = 32 << 20
FULL = (1000, 715)
QUICK = (100, 150)
DEATHS = 0.1


def play(nodes: int, pieces: int, *, deaths: float) -> tuple[World, float]:
    """The world at its end, and how long it took to compute."""
    world = World(nodes=nodes, pieces=pieces, length=PIECE_BYTES, rate=RATE, regions=REGIONS, chunks=1, batch_s=0.03)
    rng = Random(nodes)
    world.start()
    for node in rng.sample(list(world.nodes.values()), int(nodes * deaths)):
        world.at(rng.uniform(0.1, 0.9) * world.bound_s, world.kill, node)
    begun_s = time.perf_counter()
    world.run(100 * world.bound_s)
    if world.faults:
        raise RuntimeError(f"the checker found {world.faults[:3]}")
    return world, time.perf_counter() - begun_s


async def run(options: Options) -> Result:
    """One run each: it is the same every time. Quick (fewer than 3 pairs): a smaller world, nothing is promised."""
    quick = options.pairs < 3
    nodes, pieces = QUICK if quick else FULL
    figures = {}
    for name, deaths in (("calm", 0.0), ("deaths", DEATHS)):
        world, took_s = play(nodes, pieces, deaths=deaths)
        figures[name] = (world.wall_s, world.wall_s / world.bound_s, world.crossing_share, world.origin_share, took_s)
    print_table(
        ["world", "wall s", "÷ bound", "crossing", "origin ÷ F", "took s"],
        [[name, *(significant(x) for x in row)] for name, row in figures.items()],
    )
    calm, dying = figures["calm"], figures["deaths"]
    reached = calm[1] <= 2.3 and calm[2] <= 1.05 and calm[3] <= 1.02
    reached = reached and dying[1] <= 2.3 and dying[2] <= 1.1 and dying[3] <= 1.05
    return Result(
        bench="fsd-swarm-sim",
        ours=calm[0],
        baseline=calm[0] / calm[1],
        ratio=calm[1],
        unit="s",
        runs=1,
        must_reach="nothing: a quick run is too small to promise anything" if quick else MUST_REACH,
        reached=reached or quick,
        extra={
            "nodes": nodes,
            "pieces": pieces,
            "crossing": significant(calm[2]),
            "origin": significant(calm[3]),
            "deaths_ratio": significant(dying[1]),
            "deaths_crossing": significant(dying[2]),
            "deaths_origin": significant(dying[3]),
            "took_s": significant(calm[4] + dying[4]),
        },
    )
