"""Every signature's shapes and types are checked while the tests run (jaxtyping + beartype)."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

install_import_hook("neuropil", "beartype.beartype")

import pytest  # noqa: E402 - the hook must be in place before anything of neuropil is imported
import torch  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Workers begin with one thread each: two that wait for one another's cores run many times slower."""
    if getattr(config.option, "numprocesses", None):
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")


@pytest.fixture(autouse=True, scope="session")
def _one_thread_a_worker() -> None:
    # Two workers with two threads each would fight for two cores.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
