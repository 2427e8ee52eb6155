"""How what was not enforced is put together in one line."""

from __future__ import annotations

import pytest

from sandboxd.cli.lacking import not_enforced

NONE = "this cgroup is not delegated to us; no user manager here"


@pytest.mark.parametrize(
    ("degraded", "said"),
    [
        ([], ""),
        ([("memory", f"{NONE}; sampled")], f"memory ({NONE}; sampled)"),
        ([("a", "short; x"), ("b", "short; y")], "a (short; x); b (short; y)"),
        (
            [("cpu_time", f"{NONE}: a lower bound"), ("root", "no overlay"),
             ("memory", f"{NONE}; sampled"), ("cpus", NONE)],
            f"cpu_time (a lower bound), memory (sampled), cpus: {NONE}; root (no overlay)",
        ),
        # where one reason only begins like the other
        ([("a", f"{NONE}s"), ("b", NONE)], f"a ({NONE}s); b ({NONE})"),
    ],
)  # fmt: skip
def test_not_enforced(degraded: list[tuple[str, str]], said: str) -> None:
    assert not_enforced(degraded) == said
