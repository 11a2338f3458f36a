"""Items by task, and the names that they have among all tasks'."""

from __future__ import annotations

from collections.abc import Sequence

from merge3.tasks.items import Item


def by_task(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Items of each task, in order."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.task, []).append(item)
    return groups


def places_by_task(items: Sequence[Item]) -> dict[str, list[int]]:
    """Positions of each task's items, in order."""
    places: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        places.setdefault(item.task, []).append(place)
    return places


def item_key(item: Item) -> str:
    """An item's name among all tasks', as response files have it."""
    return f"{item.task}/{item.id}"


def keys_by_task(items: Sequence[Item]) -> dict[str, list[str]]:
    """Keys of each task's items, in order."""
    return {task: [item_key(item) for item in group] for task, group in by_task(items).items()}
