"""The real model, loaded once for all tests of loading."""

import pytest

from neuropil.models import Model, load


@pytest.fixture(scope="session")
def smollm2() -> Model:
    return load("smollm2")
