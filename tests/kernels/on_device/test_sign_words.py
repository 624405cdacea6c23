import numpy as np
import pytest
import torch

from gradcodec.reference.hadamard import random_sign_words
from gradcodec_kernels.sign_words import sign_words


def words(guarded, count, seed, skipped=0):
    """The kernel's words of a seed, after some that were taken before."""
    generator = np.random.PCG64(seed)
    generator.advance(skipped)
    out = guarded((count,), torch.int64)
    sign_words(out, **{k: generator.state["state"][s] for k, s in KEYS})
    return out.cpu()


KEYS = (("state", "state"), ("increment", "inc"))


@pytest.mark.parametrize("count", [0, 1, 63, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_words_are_those_of_numpy(guarded, count, seed):
    assert torch.equal(words(guarded, count, seed), random_sign_words(64 * count, seed))


def test_words_far_from_the_start_are_those_of_numpy(guarded):
    """Jumps compose: any position is reached, whatever came before."""
    far = np.random.PCG64(7)
    far.advance(2**40 + 5)
    expected = torch.from_numpy(far.random_raw(70).view(np.int64))
    assert torch.equal(words(guarded, 70, 7, 2**40 + 5), expected)
