"""Jobs of two domains share no tenant; and of tenants there are not more than are needed."""

from __future__ import annotations

import pytest
import trio

from sandboxd.job import Job
from sandboxd.supervise import known
from sandboxd.supervise.runner import open_runner
from tests.supervise.variants import policy


def job(domain: str | None, *argv: str) -> Job:
    files = {"a": (domain or "").encode()}
    return Job(argv=argv or ("cat", "a"), policy=policy(), files=files, domain=domain)


async def test_a_domain_has_a_tenant_of_its_own() -> None:
    async with open_runner(slots=2) as runner:
        for domain in ("a", "b", None, "a"):
            result = await runner.run(job(domain))
            assert result.stdout.decode() == (domain or "")
        assert runner.statistics().tenants == 3


async def test_tenants_that_nobody_uses_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "MOST_LIVING", 2)
    async with open_runner(slots=2, spares=1) as runner:

        async def sleeping() -> None:
            assert (await runner.run(job("long", "sleep", "1"))).ok

        async with trio.open_nursery() as nursery:
            nursery.start_soon(sleeping)
            for _ in range(2):
                for number in range(5):
                    assert (await runner.run(job(str(number)))).stdout == str(number).encode()
        with trio.fail_after(30):
            while runner.statistics().tenants > 3:  # one more may have come meanwhile
                assert (await runner.run(job("long"))).ok
