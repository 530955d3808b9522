"""Draw the graphs of a network from the settings of its family.

Source: Ru, Esperanca, Carlucci, "Neural Architecture Generator Optimization", NeurIPS 2020, section 3.1: Watts-Strogatz
on top, Erdos-Renyi in the middle, Watts-Strogatz at the bottom. Here every cell and every module has a wiring of its
own; the public code draws all of a level from seed 0, so that they are equal and a family has a single member.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import networkx as nx

from morph.errors import FamilyError
from morph.family.settings import FamilySettings
from morph.zoo.random_graph import Blueprint, Sources

_TRIES = 20_000  # the least likely setting, ten nodes at 0.1, is connected once in some hundreds


def draw_blueprint(settings: FamilySettings, seed: int) -> Blueprint:
    """Draw the wiring of one network; the same for the same settings and seed.

    Raises:
        FamilyError: If no connected graph is found.
    """
    draws = random.Random(seed)
    top = _small_world(settings.top_nodes, settings.top_neighbours, settings.top_rewiring, draws)
    cells = []
    for _ in top:
        middle = _independent(settings.middle_nodes, settings.middle_probability, draws)
        bottom = (settings.bottom_nodes, settings.bottom_neighbours, settings.bottom_rewiring)
        cells.append((middle, tuple(_small_world(*bottom, draws) for _ in middle)))
    return Blueprint(top, tuple(cells))


def _small_world(nodes: int, neighbours: int, rewiring: float, draws: random.Random) -> Sources:
    """A connected Watts-Strogatz graph."""
    near = min(neighbours, nodes - 1)
    return _connected(lambda: nx.watts_strogatz_graph(nodes, near, rewiring, seed=draws))


def _independent(nodes: int, probability: float, draws: random.Random) -> Sources:
    """A connected Erdos-Renyi graph."""
    return _connected(lambda: nx.gnp_random_graph(nodes, probability, seed=draws))


def _connected(draw: Callable[[], nx.Graph[int]]) -> Sources:
    """Draw until the graph is connected, and direct every edge from its lower node to its higher one."""
    for _ in range(_TRIES):
        graph = draw()
        if nx.is_connected(graph):
            lower = [sorted(other + 1 for other in graph.neighbors(node) if other < node) for node in sorted(graph)]
            return tuple(tuple(read) or (0,) for read in lower)
    raise FamilyError(f"no connected graph was found in {_TRIES:,} tries; give more neighbours or a larger probability")
