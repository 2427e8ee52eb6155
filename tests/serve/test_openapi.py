"""/openapi.json is true: schemathesis asks every route what the page says, and what it does not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.serving import folder, process
from tests.serve.test_callers import free_port

NOT_ASKED = (
    "positive_data_acceptance",  # a policy, a quota and other fields say no to what a type allows
    "use_after_free",  # DELETE cancels, and what is cancelled is still there
    "ensure_resource_availability",  # a job of an id that is taken is no new one
)


@pytest.mark.time_limit(100)
async def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    port = free_port()
    where = f"http://127.0.0.1:{port}"
    with folder() as place, process(place, "--listen", where) as one:
        await (await one.links()).close()
        words = [
            *("run", f"{where}/openapi.json", "--generation-deterministic", "--max-examples", "8"),
            *("--phases", "coverage,fuzzing", "--exclude-checks", ",".join(NOT_ASKED)),
            *("--no-color", "--request-timeout", "20"),
        ]
        code = "from schemathesis.cli import schemathesis; schemathesis()"
        done = subprocess.run(  # noqa: ASYNC221
            [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True,
            check=False, timeout=90,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        asked = re.search(r"Selected: (\d+)/(\d+)\n +Tested: (\d+)", done.stdout)
        assert asked is not None
        assert len({*asked.groups()}) == 1
        assert int(asked[1]) > 15
        assert one.errors() == ""
