"""Finds the choices of all layers of a prompt at once, where each launch has its cost."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from corematching.protocol import PrefillView

Found = Mapping[str, Tensor | None]


@dataclass
class Group:
    """Layers that are solved together.

    Attributes
    ----------
    items : list
        What each layer that is not solved yet gave.
    solved : int
        Layers that are.
    found : dict
        By the layer's place in the group, what was found and not asked for yet.
    """

    items: list[Any] = field(default_factory=list)
    solved: int = 0
    found: dict[int, Found] = field(default_factory=dict)


@dataclass
class Waiting:
    """The groups of one prompt."""

    groups: dict[Hashable, Group] = field(default_factory=dict)


def find_together(
    view: PrefillView, key: Hashable, item: Any, solve: Callable[[Sequence[Any]], list[Found]]
) -> Callable[[], Found]:
    """Put a layer off until the first choice of its group is asked for.

    Parameters
    ----------
    view : PrefillView
        The layer.
    key : hashable
        The same for all layers that can be solved together.
    item : Any
        What ``solve`` needs of this layer.
    solve : callable
        Gives what each of a sequence of items comes to.

    Returns
    -------
    callable
        For `NeuronChoice.later`.
    """
    group = view.recall(Waiting).groups.setdefault(key, Group())
    place = group.solved + len(group.items)
    group.items.append(item)

    def later() -> Found:
        if place not in group.found:
            results = solve(group.items)
            group.found.update(enumerate(results, group.solved))
            group.solved, group.items = group.solved + len(results), []
        return group.found.pop(place)

    return later
