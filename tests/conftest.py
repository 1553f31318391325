"""Set-up of all tests: one thread each (they run in parallel), one seed each."""

import re

import pytest
import torch

from tests import table

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--write-formats", action="store_true", help="write docs/formats.md's table")


OUTCOMES = {}


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome == "failed":
        found = re.search(r"test_formats\.py::test_(\w+)\[(.+)\]$", report.nodeid)
        if found:
            OUTCOMES[found[1], found[2]] = report.outcome


def pytest_sessionfinish(session):
    # Worker processes of pytest-xdist have no reports of the others.
    if session.config.getoption("--write-formats") and not hasattr(session.config, "workerinput"):
        table.write(OUTCOMES)
