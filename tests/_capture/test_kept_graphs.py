"""A process compiles equal graphs once, and others separately."""

import copy
import functools
import gc
import warnings
import weakref

import torch
from capturing import check_same, fitted, needs_compiler, replace_compiler
from conftest import make_pair
from torch import nn

import pyro_vae as pv


@needs_compiler
def test_equal_graphs_are_compiled_once(binary, monkeypatch):
    compiled = []

    def counted(graph, inputs, options):
        compiled.append(graph)
        return graph

    replace_compiler(monkeypatch, counted)
    for seed in range(3):  # with other parameters and the same architecture
        torch.manual_seed(seed)
        make = functools.partial(map, copy.deepcopy, make_pair())
        check_same(make, binary[torch.randperm(len(binary))])
    assert len(compiled) == 1
    check_same(make_pair, binary, objective=pv.objectives.BetaELBO(0.7))
    check_same(make_pair, binary, objective=pv.objectives.BetaELBO(0.8))
    assert len(compiled) == 3


@needs_compiler
def test_compiled_graphs_do_not_keep_data_or_parameters(binary):
    data = binary.clone()
    model, guide = make_pair()
    fit = pv.fit(model, guide, data, epochs=4, batch_size=10, progress=False, capture=True)
    assert fit.execution == "captured"
    held = [weakref.ref(each) for each in (data, model, guide, *model.parameters())]
    del data, model, guide, fit
    gc.collect()
    assert [each() for each in held] == [None] * len(held)


@needs_compiler
def test_views_of_one_tensor_have_the_code_of_their_layout():
    """Equal shapes and strides, and other places in the tensor that both are views of."""

    class Shifted(nn.Module):
        def __init__(self, offset):
            super().__init__()
            flat = torch.zeros(48)
            self.register_buffer("first", flat[:16])
            self.register_buffer("second", flat[offset : offset + 16])
            self.layer = nn.Linear(2, 16)

        def forward(self, z):
            self.first.add_(1.0)
            return self.layer(z) + self.second

    def make(offset):
        likelihood = pv.likelihoods.Bernoulli(Shifted(offset))
        model = pv.LatentVariableModel(pv.priors.StandardNormal(2), likelihood)
        return model, pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))

    x = torch.bernoulli(torch.full((40, 16), 0.4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first pair, one view twice, may not be captured
        fitted(functools.partial(make, 0), x, capture=True)
    check_same(functools.partial(make, 16), x)
