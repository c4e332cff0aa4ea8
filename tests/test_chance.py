"""evaluation/compare.py: how often the test of a difference is wrong, and right.

`python tests/test_chance.py` prints the rates of RESULTS.md.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluation import compare


def rates(images: int, pairs: int, difference: float = 0.0) -> tuple[float, float]:
    """How often p < 0.05 for that many pairs of methods, with the test of eval.py and with the bootstrap alone.

    The scores of an image depend on how hard it is, like S-measures; the methods differ by `difference` on average.
    """
    rng = np.random.default_rng(images)
    hardness = rng.beta(5, 1.5, (images, 1))
    ours, other = (hardness ** rng.lognormal(0, 0.3, (images, pairs)) for _ in range(2))
    differences = ours - other + difference  # (images, pairs)
    chunks = [weights @ differences for weights in compare.resample_weights(images, compare.RESAMPLES)]
    resampled = np.concatenate(chunks).T
    p = map(compare.p_value, differences.mean(axis=0), resampled, [images] * pairs)
    share = 2 * np.minimum(np.mean(resampled <= 0, axis=1), np.mean(resampled >= 0, axis=1))
    return float(np.mean(np.array([*p]) < 0.05)), float(np.mean(share < 0.05))


@pytest.mark.parametrize("images", [20, 100])
def test_two_hundred_pairs_of_methods_differ_beyond_chance_only_if_they_do(images):
    assert 0.02 <= rates(images, 200)[0] <= 0.08
    assert rates(images, 200, difference=0.15)[0] == 1


if __name__ == "__main__":
    for number in (20, 60, 250, 2000):
        rate, alone = rates(number, 2000)
        power = rates(number, 2000, 0.03)[0]
        print(f"{number} images: {rate:.3f}, bootstrap alone {alone:.3f}, with a difference of 0.03 {power:.3f}")
