"""The slot: a live transformers model whose weights a recipe overwrites in place.

Parameters keep their addresses for the slot's whole life, so what was captured or compiled over them
stays valid from candidate to candidate.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch

from merge3.checkpoint.architecture import loading, tied
from merge3.checkpoint.layout import Layout, Ref
from merge3.checkpoint.naming import is_buffer
from merge3.errors import CheckpointError, RecipeError
from merge3.methods import METHODS, Plan, execute, method_named, plan, steps_for
from merge3.methods.base import Copy
from merge3.methods.execute import Output
from merge3.overlap import Overlap
from merge3.pool import Pool
from merge3.recipe import Recipe
from merge3.streaming import execute_streamed, refs_of

_LOADERS = (
    ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    ("ForImageClassification", "AutoModelForImageClassification"),
    ("", "AutoModelForCausalLM"),
)


class Slot:
    """One model over a pool. dtype: of its weights (default: what the endpoints' dtypes promote to).

    overlap: on a GPU, merge layer by layer while the layers before already compute (see overlap.py) instead of
    the whole model in one launch. The weights are the same; where it pays, `benchmarks/gpu_check.py` tells.
    """

    def __init__(self, pool: Pool, dtype: torch.dtype | None = None, overlap: bool = False):
        self.pool = pool
        self.model = load_model(pool, dtype or _promoted(pool))
        self._weights = self._bind()
        self._head = pool.base
        self._prepared: OrderedDict = OrderedDict()
        self._overlap = Overlap(self.model, self._layout, pool.device) if overlap else None

    def swap(self, recipe: Recipe, seed: int = 0, where: str = "recipe") -> dict[str, str]:
        """Overwrite the model with the recipe's merge. Returns tensors that are kept, with the reason.

        seed: of random keeps; the same seed drops the same elements for every candidate.
        Raises RecipeError if the recipe makes another number of layers than the base has.
        """
        planned, method = self.plan(recipe, where), METHODS[recipe.method]
        head = set(self.pool.heads.get(self.pool.base, ()))
        written = self._weights.keys() - head  # buffers that the model computes itself are not among them
        jobs = [job for job in planned.jobs if job.name in written]
        steps = steps_for(method, jobs, self.pool.statistics)
        outputs = [(j.name, s, self._weights[j.name]) for j, s in zip(jobs, steps)]
        outputs += [(name, Copy(ref), self._weights[name]) for name, ref in planned.copies.items() if name in written]
        if self._overlap:
            self._settle()
            stages: dict[int | None, list[Output]] = {}
            for output in outputs:
                stages.setdefault(self._layout.layer_of(output[0]), []).append(output)
            order = sorted(stages, key=lambda stage: -1 if stage is None else stage)
            self._overlap.run((stage, partial(self._execute, stages[stage], seed)) for stage in order)
        else:
            self._execute(outputs, seed)
        self._share(planned.ties)
        return planned.kept

    def plan(self, recipe: Recipe, where: str = "recipe") -> Plan:
        """What `swap` would do. Raises RecipeError for what it would refuse."""
        planned = plan(recipe, method_named(recipe.method, f"{where}: merge_method"), self.pool, where)
        if planned.layers != self._layout.layers:
            raise RecipeError(where, f"{planned.layers} layers", f"{self._layout.layers}, as in the base: a slot cannot grow")
        return planned

    def _share(self, ties: dict[str, str]) -> None:
        """A merge of models that all tie their output, in a live model that holds it apart for the sake of others."""
        for name in self.pool.outputs:
            source = ties.get(name)
            if source is not None and name in self._weights:
                self._settle()
                with torch.no_grad():
                    self._weights[name].copy_(self._weights[source])

    def _execute(self, outputs: list[Output], seed: int) -> None:
        here = {name: self.pool.resident(refs_of(step)) for name, step, _ in outputs}
        with torch.no_grad():
            execute((o for o in outputs if here[o[0]]), self.pool.get, seed, self._prepared)
            execute_streamed((o for o in outputs if not here[o[0]]), self.pool, seed)

    @property
    def _layout(self) -> Layout:
        return self.pool.layouts[self.pool.base]

    def _settle(self) -> None:
        if self._overlap:
            self._overlap.settle()

    def load(self, model: str) -> None:
        """Overwrite the model with an endpoint as it is, head included."""
        self._settle()
        self.use_head(model)
        with torch.no_grad():
            for name, weight in self._weights.items():
                ref = Ref(model, name)
                if not self.pool.has(ref):
                    continue
                tensor = self.pool.get(ref)
                if tensor.shape != weight.shape:  # more, or fewer, tokens: the rows that both have
                    if tensor.shape[1:] != weight.shape[1:]:
                        continue
                    rows = min(len(tensor), len(weight))
                    tensor, weight = tensor[:rows], weight[:rows]
                weight.copy_(tensor)

    def use_head(self, model: str) -> None:
        """Put an endpoint's own head (tensors outside the backbone) on the live model."""
        if model == self._head or model not in self.pool.heads:
            return
        checkpoint = self.pool.endpoints[model]
        for name in self.pool.heads[model]:
            owner, _, attribute = name.rpartition(".")
            module = self.model.get_submodule(owner)
            tensor = checkpoint.get(name).to(self.pool.device, next(self.model.parameters()).dtype, copy=True)
            setattr(module, attribute, torch.nn.Parameter(tensor, requires_grad=False))
            if isinstance(module, torch.nn.Linear):
                module.out_features, module.in_features = module.weight.shape
        self.model.config.label2id = dict(checkpoint.config.get("label2id") or {})
        labels = len(self.model.config.label2id) or self.model.config.num_labels
        if hasattr(self.model, "num_labels"):
            self.model.num_labels = labels
        self._head = model

    def _bind(self) -> dict[str, torch.Tensor]:
        """Checkpoint name -> the live tensor, for every tensor of the base."""
        live = {**dict(self.model.named_buffers()), **dict(self.model.named_parameters(remove_duplicate=False))}
        prefix = getattr(self.model, "base_model_prefix", "")
        bound, missing = {}, []
        shapes = {name: info.shape for name, info in self.pool.base_checkpoint.tensors.items()}
        apart = {name: self.pool.shape(Ref(self.pool.base, name)) for name in self.pool.outputs}
        for name, shape in (shapes | apart).items():
            tensor = live.get(name, live.get(f"{prefix}.{name}", live.get(name.removeprefix(f"{prefix}."))))
            if tensor is None or tuple(tensor.shape) != shape:
                missing.append(name)
            else:
                bound[name] = tensor.data
        missing = [name for name in missing if not is_buffer(name, shapes.get(name, ()))]
        if missing and (said := loading(self.pool.base_checkpoint.config, shapes)):
            missing = [name for name in missing if name not in said.unexpected]  # transformers does not load them either
        if missing:
            raise CheckpointError(
                self.pool.base, f"tensor {missing[0]!r} (one of {len(missing)}) is no parameter of {type(self.model).__name__}",
                "an architecture whose checkpoint names are its parameters",
            )  # fmt: skip
        return bound


def _promoted(pool: Pool) -> torch.dtype:
    """The common dtype of the largest tensor: what a recipe without a dtype is exported in."""
    tensors = pool.base_checkpoint.tensors
    return pool.common_dtype(max((t for t in tensors if tensors[t].dtype.is_floating_point), key=lambda t: tensors[t].nbytes))


def load_model(pool: Pool, dtype: torch.dtype):
    """The base as a transformers model, for inference, on the pool's device."""
    import transformers

    architecture = (pool.base_checkpoint.config.get("architectures") or [""])[0]
    loader = next(getattr(transformers, auto) for suffix, auto in _LOADERS if suffix in architecture)
    config = None
    if pool.outputs and tied(pool.base_checkpoint.config):  # another endpoint has an output of its own
        config = transformers.AutoConfig.from_pretrained(pool.base_checkpoint.path, trust_remote_code=False)
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            part.tie_word_embeddings = False
    try:
        model = loader.from_pretrained(
            pool.base_checkpoint.path, dtype=dtype, trust_remote_code=False, use_safetensors=True,
            **({} if config is None else {"config": config}),
        )  # fmt: skip
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).split("\n")[0][:200]
        hint = "its own code is never run" if pool.base_checkpoint.config.get("auto_map") else ""
        raise CheckpointError(pool.base, f"transformers cannot load it ({reason})", "a supported architecture", hint) from None
    return model.to(pool.device).eval().requires_grad_(False)
