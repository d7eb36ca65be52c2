"""Data of AnnData objects."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from conftest import make_pair

import pyro_vae as pv

anndata = pytest.importorskip("anndata")


@pytest.fixture
def adata():
    counts = sp.csr_array(np.random.default_rng(0).poisson(0.4, (30, 16)).astype("float64"))
    counts.data[:] = 1.0
    table = pd.DataFrame(
        {
            "batch": pd.Categorical(["b", "a", "c"] * 10, categories=["c", "a", "b", "unused"]),
            "donor": ["x", "y"] * 15,
            "age": np.arange(30),
            "treated": [True, False] * 15,
        },
        index=[f"cell {i}" for i in range(30)],
    )
    return anndata.AnnData(counts, obs=table, layers={"dense": counts.toarray() + 1})


def test_matrix_stays_sparse_and_covariates_are_indicators_or_numbers(adata):
    x, batch, age, treated, donor = pv.datasets.from_anndata(
        adata, covariates=["batch", "age", "treated", "donor"]
    )
    assert sp.issparse(x)
    assert np.shares_memory(x.data, adata.X.data)
    assert batch[:3].tolist() == [[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]]
    assert age[:, 0].tolist() == [*range(30)]
    assert treated[0].tolist() == [0, 1]
    assert donor[1].tolist() == [0, 1]
    assert {column.dtype for column in (batch, age, treated, donor)} == {torch.float32}
    (dense,) = pv.datasets.from_anndata(adata, layer="dense")
    assert torch.equal(dense.float(), torch.tensor(x.toarray() + 1).float())


def test_conditional_pair_is_fitted_and_evaluated(adata):
    data = pv.datasets.from_anndata(adata, covariates=["batch"])
    likelihood = pv.likelihoods.NegativeBinomial(pv.nets.Joined(pv.nets.MLP(2 + 4, [8], 16)))
    model = pv.models.ConditionalModel(pv.priors.StandardNormal(2), likelihood)
    guide = pv.guides.AmortizedNormal(model, pv.nets.Joined(pv.nets.MLP(16 + 4, [8])))
    fit = pv.fit(model, guide, data, epochs=2, batch_size=10, progress=False, capture=False)
    assert np.isfinite(fit.history.loss).all()
    few = tuple(column[:7] for column in data)
    assert len(pv.evidence(model, guide, few, num_particles=2).values) == 7


def test_wrong_arguments_are_refused(adata, tmp_path):
    refused = [
        (lambda: pv.datasets.from_anndata(adata.X), TypeError, "adata must be an anndata.AnnData"),
        (
            lambda: pv.datasets.from_anndata(adata, layer="raw"),
            ValueError,
            r"layer must be one of \['dense'.*\], got 'raw'",
        ),
        (
            lambda: pv.datasets.from_anndata(adata, covariates=["sex"]),
            ValueError,
            "covariates must be columns of adata.obs, .* got 'sex'",
        ),
        (
            lambda: pv.datasets.from_anndata(anndata.AnnData(obs=adata.obs)),
            ValueError,
            "adata has no matrix X: pass layer",
        ),
        (
            lambda: pv.fit(*make_pair(), adata, progress=False),
            ValueError,
            r"got AnnData: pass pyro_vae.datasets.from_anndata\(adata\)",
        ),
    ]
    for call, kind, message in refused:
        with pytest.raises(kind, match=message):
            call()
    adata.obs["batch"] = adata.obs["batch"].cat.remove_categories("c")
    with pytest.raises(ValueError, match=r"no missing values, but column 'batch' .* has 10"):
        pv.datasets.from_anndata(adata, covariates=["batch"])


def test_an_empty_object_is_refused(adata):
    for empty in (adata[:0], adata[:, :0]):
        with pytest.raises(ValueError, match="adata must have at least one observation and one"):
            pv.datasets.from_anndata(empty, covariates=["batch"])
