"""What every test relies on: offline, few threads, seeded, and Hypothesis profiles.

HYPOTHESIS_PROFILE=thorough python -m pytest    runs eight times as many examples.
"""

import gc
import os

# Read by huggingface_hub and transformers when they are imported, so set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import hypothesis
import pytest
import torch

from loraparam.testing.seeding import seed

# The tensors are tiny: more threads would only fight over the cores, with each other and with other workers.
torch.set_num_threads(1)


class _TorchRandom:
    """torch's global generator as Hypothesis wants it, so that it seeds and restores it around each example."""

    seed = staticmethod(seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_torch_random = _TorchRandom()  # Hypothesis keeps a weak reference only
hypothesis.register_random(_torch_random)

# No deadline: the first call of an operation may take a hundred times as long as the second. In CI a run is
# derandomized: it checks the change; looking for new counterexamples is left to people, who can act on them.
_in_ci = bool(os.environ.get("CI"))
hypothesis.settings.register_profile("default", deadline=None, max_examples=25, derandomize=_in_ci)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=200)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


class _EveryTest:
    """Fixtures for all tests, the doctests outside this folder included (a conftest's own reach only its folder)."""

    @pytest.fixture(autouse=True)
    def _seed(self) -> None:
        seed(0)


def pytest_collection_finish() -> None:
    # What was imported stays: garbage is collected often, by Trainers and by tests of what is left behind, and none
    # of it is there.
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_EveryTest(), "loraparam-every-test")
