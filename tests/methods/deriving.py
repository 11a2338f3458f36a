"""Derived task vectors of given ones, as the pool derives them, without a pool."""

import torch

from merge3 import METHODS
from merge3.checkpoint.layout import Ref
from merge3.methods import Job


def job_of(method, name, shape, experts, weights=None, **shared):
    """With every default that is not given. weights: of every expert, where the method has such."""
    row = METHODS[method]
    own = [{} for _ in range(experts)]
    values = {key: parameter.default for key, parameter in row.parameters.items() if parameter.scope == "shared"}
    if "weight" in row.parameters:
        own = [{"weight": 1.0 if weights is None else weights[i]} for i in range(experts)]
    sources = tuple(Ref(f"e{i}", name) for i in range(experts))
    return Job(name, Ref("base", name), sources, values | shared, tuple(own), tuple(shape))


def derived(method, vectors, base=None, **parameters):
    """name -> the derived expert's task vector. vectors: name -> task vector, of every expert; base: default zeros."""
    row, jobs = METHODS[method], {}
    base = base or {name: torch.zeros_like(tensor) for name, tensor in vectors[0].items()}
    for name, tensor in vectors[0].items():
        jobs[name] = job_of(method, name, tensor.shape, len(vectors), **parameters)

    def read(asked):
        for job in asked:
            yield job, [base[job.name], *(base[job.name] + own[job.name] for own in vectors)]

    with torch.no_grad():
        found = () if row.survey is None else (row.survey(list(jobs.values()), read),)
        return {job.name: row.derive(job, tensors, *found) - tensors[0] for job, tensors in read(jobs.values())}
