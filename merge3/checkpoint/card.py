"""The model card of a merge: what it was made from, and how to make it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merge3.recipe import Recipe


def model_card(recipe: Recipe, sources: Sequence[str], kept: Mapping[str, object], seed: int) -> str:
    """Markdown with the YAML front matter hubs read. sources: models, base first."""
    hub_ids = [s for s in sources if s.count("/") == 1 and not s.startswith((".", "/"))]
    front = ["---", "library_name: transformers", "tags:", "- merge", "- merge3"]
    if hub_ids:
        front += ["base_model:", *(f"- {s}" for s in hub_ids)]
    base = f"Base: `{recipe.base_model}`" if recipe.base_model else "No base."
    lines = [
        *front, "---", "", "# A merge of language models", "",
        f"Made by merge3 with the method `{recipe.method}`. {base}", "", "Models:", "",
        *(f"- `{s}`" for s in sources), "", "Recipe (mergekit's format):", "", "```yaml",
        f"# random seed: {seed}", recipe.to_yaml().rstrip(), "```", "",
    ]  # fmt: skip
    if kept:
        lines += ["Not merged, taken from one model as they are:", "", *(f"- `{name}`" for name in kept), ""]
    return "\n".join(lines)
