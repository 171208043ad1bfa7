"""What tests of exports share."""

import warnings

import pytest


@pytest.fixture
def quiet(caplog):
    """Neither warnings nor the log of exporters."""
    caplog.set_level("ERROR")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning, UserWarning))
        yield
