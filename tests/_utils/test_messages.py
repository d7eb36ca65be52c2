"""Messages of the library that quote an error of torch, of Pyro or of a user's program."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae._utils.messages import first_line

X = torch.rand(20, 6)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(1))


def model(x, size=2):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ torch.rand(size, 6), 1.0).to_event(1), obs=x)


def guide_of_wide_data(x):
    guide(x @ torch.eye(7))


def model_of_wide_latents(x):
    model(x, size=3)


def failing_in_handler(x):
    """Fail inside of Pyro's trace, which appends the shapes of all sites to a message."""
    pyro.poutine.trace(model_of_wide_latents).get_trace(x)


CALLS = {
    "fit": lambda m, g: pv.fit(m, g, X, epochs=1, progress=False),
    "evidence": lambda m, g: pv.evidence(m, g, X, num_particles=2),
    "surgery": lambda m, g: pv.elbo_surgery(m, g, X),
    "compare": lambda m, g: pv.compare({"a": (m, g)}, X, num_particles=2),
}


@pytest.mark.parametrize("call", ["fit", "evidence", "surgery", "compare"])
@pytest.mark.parametrize(
    ("pair", "program"),
    [
        ((model_of_wide_latents, guide), "model"),
        ((failing_in_handler, guide), "model"),
        ((model, guide_of_wide_data), "guide"),
    ],
    ids=["model", "trace in the model", "guide"],
)
def test_an_error_of_a_program_names_the_program_and_ends_in_advice(call, pair, program):
    with pytest.raises(ValueError, match=rf"the {program} cannot run on .*shape \(20, 6\)") as held:
        CALLS[call](*pair)
    message = str(held.value)
    assert "mat1 and mat2 shapes cannot be multiplied" in message
    assert "Trace Shapes" not in message
    assert "\n" not in message
    assert message.endswith("that it expects.")
    assert isinstance(held.value.__cause__, RuntimeError)


def test_the_first_line_leaves_out_values_and_shapes():
    with pytest.raises(ValueError, match="Expected parameter scale") as held:
        dist.Normal(torch.zeros(3), -torch.ones(3))
    assert "\n" in str(held.value)
    assert first_line(held.value).endswith("but found invalid values")
    assert first_line(ValueError(" one.\ntwo")) == "one"
    assert first_line(RuntimeError()) == "RuntimeError"
