import math

import pytest
import torch
from torch import nn

from rcm.training.ema import PowerEMA, exponent


@pytest.mark.parametrize(("length", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_of_the_published_lengths(length, gamma):
    assert exponent(length) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_length_is_the_deviation_of_the_profile(length):
    # t^gamma on [0, 1] is the density of Beta(gamma + 1, 1)
    a = exponent(length) + 1
    assert math.sqrt(a / ((a + 1) ** 2 * (a + 2))) == pytest.approx(length, rel=1e-9)


@pytest.mark.parametrize("length", [0.0, 0.3, -1.0])
def test_impossible_length_is_refused(length):
    with pytest.raises(ValueError, match="between 0 and"):
        exponent(length)


def test_weights_of_the_average_follow_the_power_profile():
    updates, length = 40, 0.1
    network = nn.Linear(updates + 1, 1, bias=False).double()
    with torch.no_grad():
        network.weight.copy_(torch.eye(updates + 1)[:1])
    ema = PowerEMA(network, length)
    for k in range(1, updates + 1):
        with torch.no_grad():
            network.weight.copy_(torch.eye(updates + 1)[k : k + 1])  # the weights after update k are a unit vector
        ema.step(k)
    power = exponent(length) + 1
    m = torch.arange(updates + 1, dtype=torch.float64)
    expected = ((m + 1) ** power - m**power) / (updates + 1) ** power
    torch.testing.assert_close(ema.average["weight"][0], expected, rtol=1e-12, atol=1e-15)


def test_applied_puts_the_average_in_and_takes_it_out_again():
    network = nn.Linear(3, 2)
    ema = PowerEMA(network, 0.05)
    average = network.weight.detach().clone()
    with torch.no_grad():
        network.weight += 1
    with pytest.raises(RuntimeError, match="preview"), ema.applied():
        assert torch.equal(network.weight, average)
        raise RuntimeError("preview")
    assert torch.equal(network.weight, average + 1)
    ema.copy_to_network()
    assert torch.equal(network.weight, average)
