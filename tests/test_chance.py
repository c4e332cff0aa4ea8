"""evaluation/compare.py: how often the test of a difference is wrong, and right."""

import benchmark_eval
import pytest


@pytest.mark.parametrize("images", [20, 100])
def test_two_hundred_pairs_of_methods_differ_beyond_chance_only_if_they_do(images):
    rate, _ = benchmark_eval.rates(images, 200)
    assert 0.02 <= rate <= 0.08
    assert benchmark_eval.rates(images, 200, difference=0.15)[0] == 1
