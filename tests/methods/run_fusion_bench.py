"""Runs fusion_bench's merges by linear algebra: python run_fusion_bench.py IN OUT, both torch files.

IN: cases, each which of MERGES and its arguments. OUT: of each, tensor's name -> the merged task vector.
"""

import contextlib
import importlib
import importlib.util
import sys
import types
from pathlib import Path

import torch

ROOT = Path(importlib.util.find_spec("fusion_bench").submodule_search_locations[0])


def part(module, stand_ins=()):
    """A module of fusion_bench, its packages empty but for their place. stand_ins: modules that it names and that need
    what is not installed; classes that it takes from them are empty, decorators and timers do nothing."""
    names = module.split(".")
    for end in range(1, len(names)):
        package = ".".join(names[:end])
        if package not in sys.modules:
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(ROOT.joinpath(*names[1:end]))]
    for name in stand_ins:
        found = sys.modules.setdefault(name, types.ModuleType(name))
        found.auto_register_config = lambda kind: kind
        found.timeit_context = lambda *_: contextlib.nullcontext()
        found.__getattr__ = empty
    return importlib.import_module(module)


def empty(name):
    """A class for one that is not installed."""
    if name.startswith("__"):  # which Python itself asks modules for
        raise AttributeError(name)
    return type(name, (), {"_config_mapping": {}})


def iso_c(vectors):
    """vectors: name -> task vector, of every expert."""
    module = part("fusion_bench.method.isotropic_merging.iso_utils", ["fusion_bench.utils", "fusion_bench.utils.type"])
    return module.iso_c(vectors, accelerator="cpu")


def tsv_m(vectors):
    """As iso_c."""
    utilities = "fusion_bench.method.task_singular_vector.utils.TSVM_utils"
    return part(utilities, ["fusion_bench.utils.type"]).compute_and_sum_svd_mem_reduction(vectors, accelerator="cpu")


def wudi(vectors, steps=300):
    """As iso_c."""
    inside = ["fusion_bench.utils", "fusion_bench.utils.state_dict_arithmetic", "fusion_bench.mixins"]
    merge = part("fusion_bench.method.wudi.wudi", ["fusion_bench", *inside]).wudi_merging
    return {name: tensor.detach() for name, tensor in merge(vectors, accelerator="cpu", iter_num=steps).items()}


def doge(vectors, eta=0.07, keep=0.3, subspace=6):
    """The whole algorithm, 400 steps, from a base of zeros: what it leaves alone is 0."""
    common = ["fusion_bench.method.base_algorithm", "fusion_bench.modelpool", "fusion_bench.mixins"]
    common += [f"fusion_bench.mixins.{name}" for name in ("lightning_fabric", "simple_profiler")]
    common += ["lightning", "fusion_bench.utils", "fusion_bench.utils.state_dict_arithmetic", "fusion_bench.utils.type"]
    module = part("fusion_bench.method.doge_ta.doge_ta", common)

    class Model:
        def __init__(self, weights):
            self.weights = weights

        def state_dict(self, keep_vars=False):
            return self.weights

        def load_state_dict(self, weights):
            self.weights = weights

    class Models(module.BaseModelPool):
        model_names = list(range(len(vectors)))

        def load_model(self, name):
            zeros = {key: torch.zeros_like(vector) for key, vector in vectors[0].items()}
            return Model(zeros if name == "_pretrained_" else vectors[name])

    module.BaseModelPool = Models  # whose instances it knows

    class Algorithm(module.DOGE_TA_Algorithm):
        fabric = types.SimpleNamespace(backward=lambda loss: loss.backward(), device=torch.device("cpu"))
        config = types.SimpleNamespace(lamda=eta, K=keep, subspace=subspace)
        profile = staticmethod(lambda what: contextlib.nullcontext())
        print_profile_summary = staticmethod(lambda: None)

        def __init__(self):
            self.delta = None

    return Algorithm().run(Models()).weights


MERGES = {merge.__name__: merge for merge in (iso_c, tsv_m, wudi, doge)}

if __name__ == "__main__":
    torch.save([MERGES[what](**given) for what, given in torch.load(sys.argv[1])], sys.argv[2])
