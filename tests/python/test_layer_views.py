# SPDX-License-Identifier: Apache-2.0
"""Layers that share a plan, parameters in tensors, and rows instead of the output."""

from __future__ import annotations

import numpy as np
import pytest

import hopyard
import layers


def test_with_weights_shares_the_plan():
    first, data = layers.make(0)
    other = layers.arrays(5)
    second = first.with_weights(other.weights(layers.spec()))
    wanted = hopyard.MoeLayer(layers.spec(), other.weights(layers.spec()), layers.TOKENS)
    call = {"logits": data.logits}
    before = first(data.bits, **call)
    np.testing.assert_array_equal(second(data.bits, **call), wanted(data.bits, **call))
    np.testing.assert_array_equal(first(data.bits, **call), before)
    assert second.weights is not first.weights
    with pytest.raises(ValueError, match="weights were made for a spec with top_k=1"):
        first.with_weights(other.weights(layers.spec(top_k=1)))


def test_parameters_in_tensors_are_read_by_every_call():
    data = layers.arrays()
    alpha = np.linspace(0.5, 2, layers.EXPERTS, dtype=np.float32)
    beta = np.linspace(-1, 1, layers.EXPERTS, dtype=np.float32)
    limit = np.linspace(0.2, 3, layers.EXPERTS, dtype=np.float32)
    weights = data.weights(layers.spec(), alpha=alpha, beta=beta, limit=limit)
    layer = hopyard.MoeLayer(layers.spec(), weights, layers.TOKENS)

    def by_spec():
        activation = hopyard.Activation("swiglu", tuple(alpha), tuple(beta), tuple(limit))
        spec = layers.spec(activation=activation)
        return hopyard.MoeLayer(spec, data.weights(spec), layers.TOKENS)

    first = layer(data.bits, logits=data.logits)
    np.testing.assert_array_equal(first, by_spec()(data.bits, logits=data.logits))
    alpha *= 3
    limit /= 2
    second = layer(data.bits, logits=data.logits)
    assert (first != second).any()
    np.testing.assert_array_equal(second, by_spec()(data.bits, logits=data.logits))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("geglu", {}, "weights.routed.alpha is given, but activation geglu takes no alpha"),
        ("swiglu", {"alpha": np.ones(3, np.float32)}, r"alpha has shape \[3\]; wanted \[8\]"),
        ("swiglu", {"alpha": np.ones(8)}, "alpha is f64; wanted f32"),
    ],
)
def test_bad_parameters(kind, change, message):
    spec = layers.spec(activation=hopyard.Activation(kind))
    fields = {"alpha": np.ones(8, np.float32), **change}
    with pytest.raises(ValueError, match=message):
        layers.arrays().weights(spec, **fields)


def test_rows_instead_of_the_output():
    layer, data = layers.make()
    slots = layers.TOKENS * layers.TOP_K
    call = {
        "logits": data.logits,
        "rows_out": np.zeros((slots, layers.HIDDEN), np.uint16),
        "slot_to_row_out": np.empty((layers.TOKENS, layers.TOP_K), np.int32),
        "routing_weights_out": np.empty((layers.TOKENS, layers.TOP_K), np.float32),
    }
    rows = layer(data.bits, finalize=False, **call)
    assert rows is call["rows_out"]
    values = hopyard.from_bf16(rows)[call["slot_to_row_out"]]
    summed = (values * call["routing_weights_out"][..., None]).sum(1)
    wanted = hopyard.from_bf16(layer(data.bits, logits=data.logits))
    np.testing.assert_allclose(summed, wanted, rtol=0.01, atol=1e-3)
    with pytest.raises(ValueError, match="finalize is False without rows_out"):
        layer(data.bits, logits=data.logits, finalize=False)
    with pytest.raises(ValueError, match="wanted neither out nor accumulate"):
        layer(data.bits, finalize=False, out=wanted, **call)
