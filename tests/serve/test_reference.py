"""docs/reference/http.md has every route, field and metric, and none that is not there."""

from __future__ import annotations

import re
from pathlib import Path

from sandboxd.serve.api import ROUTES
from sandboxd.serve.ensemble import (
    GroupSubmission,
    GroupView,
    MemberSubmission,
    PipelineSubmission,
    PipelineView,
    PipeSubmission,
)
from sandboxd.serve.manifold import BatchSubmission
from sandboxd.serve.metrics import Metrics
from sandboxd.serve.views import CallerView, FailureView, Overview, RunningView
from sandboxd.serve.wire import JobView, Submission
from tests.serve.serving import daemon

PAGE = (Path(__file__).resolve().parent.parent.parent / "docs/reference/http.md").read_text()
SECTIONS = {part.split("\n")[0]: part for part in re.split(r"^##+ ", PAGE, flags=re.MULTILINE)}


def first_cells(section: str) -> set[str]:
    rows = re.findall(r"^\| (`[^|]*) \|", SECTIONS[section], re.MULTILINE)
    return {word for row in rows for word in re.findall(r"`([^`]+)`", row)}


def test_every_route_is_there() -> None:
    assert first_cells("Routes") == {f"{route.method} {route.path}" for route in ROUTES}


def test_every_field_of_a_submission_is_there() -> None:
    assert first_cells("A job") == set(Submission.__struct_fields__)


def test_every_field_of_a_batch_is_there() -> None:
    assert first_cells("A batch") == set(BatchSubmission.__struct_fields__)


def test_every_field_of_a_group_and_of_a_pipeline_is_there() -> None:
    fields = {*GroupSubmission.__struct_fields__, *PipelineSubmission.__struct_fields__}
    assert first_cells("A group, or a pipeline") == fields
    words = set(re.findall(r"`(\w+)`", SECTIONS["A group, or a pipeline"]))
    for kind in (MemberSubmission, GroupView, PipelineView):
        assert set(kind.__struct_fields__) <= words
    for name in PipeSubmission.__struct_fields__:
        assert f'"{name}": ' in SECTIONS["A group, or a pipeline"]


def test_every_field_of_a_view_is_there() -> None:
    assert first_cells("A view") == set(JobView.__struct_fields__)


def test_every_field_of_the_overview_is_there() -> None:
    assert first_cells("The overview") == set(Overview.__struct_fields__)
    words = set(re.findall(r"`(\w+)`", SECTIONS["The overview"]))
    for kind in (RunningView, FailureView, CallerView):
        assert set(kind.__struct_fields__) <= words


async def test_every_metric_is_there() -> None:
    async with daemon() as served:
        names = set(re.findall(r"^# TYPE (\w+)", served.book.metrics.text().decode(), re.MULTILINE))
        own = set(
            re.findall(r"^# TYPE (\w+)", served.book.metrics.text("x").decode(), re.MULTILINE)
        )
        more = set(re.findall(r"`(\w+)[{`]", SECTIONS["Metrics"].partition("And for those")[2]))
        assert own == names - more
    assert {one.partition("{")[0] for one in first_cells("Metrics")} == names
    assert Metrics().text()
