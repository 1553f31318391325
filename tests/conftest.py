"""Set-up of all tests: one thread each (they run in parallel), one seed each."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
