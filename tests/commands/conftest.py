from __future__ import annotations

import pytest

# Before the modules are imported, so that their assertions tell what differed.
pytest.register_assert_rewrite(
    "commands.program", "commands.running", "interop.peers", "tunnels.running", "tunnels.service"
)

from tunnels.fixtures import children, nobody, service  # noqa: E402

__all__ = ["children", "nobody", "service"]
