"""Gradients through `apply` and the MTP chain, with and without rematerialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax import model
from dskjax.params import named_leaves
from pallas_kernels.testing import jit
from tests.model.common import tiny


def gradients(remat):
    t = tiny()
    tokens = jnp.asarray(t.tokens[:, :9])

    def loss(params):
        out = model.trunk(params, tokens, cfg=t.cfg, remat=remat)
        chain = model.mtp_chain(params, tokens, out.hidden, cfg=t.cfg, depths=2, remat=remat)
        logits = [model.head(params, h[:, :7], cfg=t.cfg) for h in (out.hidden, *chain.hidden)]
        return sum(jax.nn.logsumexp(x, axis=-1).mean() for x in logits)

    return dict(named_leaves(jit(jax.grad(loss))(t.params)))


@pytest.fixture(scope="module")
def plain():
    return gradients(None)


@pytest.mark.parametrize(
    "policy", ["nothing_saveable", pytest.param("dots_saveable", marks=pytest.mark.full)]
)
def test_checkpoint_policies_change_no_gradient(plain, policy):
    found = gradients(getattr(jax.checkpoint_policies, policy))
    for name, gradient in plain.items():
        np.testing.assert_allclose(found[name], gradient, rtol=1e-4, atol=1e-6, err_msg=name)


def test_every_weight_but_the_selection_bias_has_a_gradient(plain):
    for name, gradient in plain.items():
        moves = float(jnp.abs(gradient).max()) > 0
        assert moves != name.endswith("e_score_correction_bias"), name
