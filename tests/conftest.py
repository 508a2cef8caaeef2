"""What holds for every test: no network, no telemetry, one thread per pool, the same generated examples each time.

The environment is set at import, before any test imports torch or a Hugging Face library, and child processes inherit
it. Knows nothing of slmdeploy: models and graphs that tests need are built in the tests.
"""

import os
import socket
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
)
# Models of the tests are so small that a second thread costs more than it brings.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A busy machine may stand still for longer than hypothesis allows an example, and says nothing of the code then.
_patient = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("steady", _patient, derandomize=True, max_examples=50)
settings.register_profile("many", _patient, max_examples=2000)  # pytest --hypothesis-profile=many: others each time
settings.load_profile("steady")


@pytest.fixture(autouse=True)
def _offline(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that connects to another machine, unless it is marked ``network``."""
    if request.node.get_closest_marker("network"):
        return
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            pytest.fail(f"a test without the marker 'network' connects to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)
