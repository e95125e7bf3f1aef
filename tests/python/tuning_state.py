# SPDX-License-Identifier: Apache-2.0
"""Tables and statistics of tuning that the process keeps."""

from __future__ import annotations

import pytest

import hopyard


def forget():
    hopyard.forget_tuning()
    hopyard.reset_tuning_stats()


@pytest.fixture(autouse=True)
def fresh():
    """They are each test's own, in modules that take this name."""
    forget()
    yield
    forget()
