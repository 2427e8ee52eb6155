"""The routes as data: handlers, /openapi.json and the reference are held against it. Pure."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

import sandboxd
from sandboxd.result import SCHEMA, Event, Result
from sandboxd.serve.ensemble import (
    GroupSubmission,
    GroupView,
    PipelineSubmission,
    PipelineView,
)
from sandboxd.serve.manifold import BatchSubmission, BatchView
from sandboxd.serve.views import Overview
from sandboxd.serve.wire import (
    DIGEST,
    NAME,
    FileView,
    Info,
    JobList,
    JobView,
    PolicyView,
    ProblemView,
    SignalRequest,
    Submission,
)

KEY = "^[\\x21-\\x7e ]{1,255}$"
"""Of an Idempotency-Key."""
BINARY = "application/octet-stream"
NDJSON = "application/x-ndjson"
SSE = "text/event-stream"
TEXT = "text/plain"
STREAMS = (
    *("events", "submit", "submit_batch", "batch_events", "overview"),
    *("submit_group", "submit_pipeline"),
)
"""Routes that may reply with lines, or server-sent events."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """One method of one path. `takes` and `gives` are types, or kinds of content."""

    method: str
    path: str
    name: str
    text: str
    takes: Any = None
    gives: Any = None
    status: tuple[int, ...] = (200,)
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    open: bool = False
    """Whether strangers may ask, too."""

    @functools.cached_property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.path.split("/")[1:])

    def match(self, path: tuple[str, ...]) -> dict[str, str] | None:
        """The values of {names} in the path; None if it is another one."""
        if len(path) != len(self.parts):
            return None
        found = {}
        for wanted, word in zip(self.parts, path, strict=True):
            if wanted.startswith("{"):
                found[wanted[1:-1]] = word
            elif wanted != word:
                return None
        return found


def _together(what: str, takes: Any, gives: Any, text: str) -> tuple[Route, ...]:
    """The routes of jobs that run together."""
    one = f"/v1/{what}s/{{id}}"
    wait = "must be 1: the reply comes when it is over, and closing the connection cancels it"
    headers = {
        "Accept": f"{NDJSON} or {SSE}: the events of all of them, as they come",
        "traceparent": "W3C Trace Context; it is in the views of its jobs and in the log",
    }
    return (
        Route(
            method="POST",
            path=f"/v1/{what}s",
            name=f"submit_{what}",
            text=f"run {text}, and wait for them",
            takes=takes,
            gives=gives,
            query={"wait": wait},
            headers=headers,
        ),
        Route(
            method="GET",
            path=one,
            name=what,
            text=f"a {what} that is not over, and how its jobs are",
            gives=gives,
        ),
        Route(
            method="DELETE",
            path=one,
            name=f"cancel_{what}",
            text=f"cancel all jobs of a {what}",
            gives=gives,
            status=(202,),
        ),
    )


_WAIT = "1: the reply comes when the job is over, and closing the connection cancels it"
ROUTES = (
    Route(
        method="POST",
        path="/v1/jobs",
        name="submit",
        text="submit a job",
        takes=Submission,
        gives=JobView,
        status=(202, 200),
        query={"wait": _WAIT},
        headers={
            "Idempotency-Key": "the same key and body again give the job that there is",
            "Accept": f"with wait=1, {NDJSON} or {SSE}: its events, as they come",
            "traceparent": "W3C Trace Context; it is in the view and in the log",
        },
    ),
    Route(
        method="GET",
        path="/v1/jobs",
        name="jobs",
        text="your jobs, the newest first",
        gives=JobList,
        query={
            "state": "queued, running or done",
            "limit": "at most 500; 100 by default",
            "before": "`next` of the page before",
        },
    ),
    Route(
        method="GET",
        path="/v1/jobs/{id}",
        name="job",
        text="a job, with its result",
        gives=JobView,
        query={"wait": "seconds to wait for its end, at most 300"},
    ),
    Route(
        method="DELETE",
        path="/v1/jobs/{id}",
        name="cancel",
        text="cancel a job",
        gives=JobView,
        status=(202, 200),
    ),
    Route(
        method="GET",
        path="/v1/jobs/{id}/events",
        name="events",
        gives=NDJSON,
        text="what happens, as it happens, to the end",
        query={
            "from": "the first event wanted; the oldest that is kept by default",
            "follow": "0: no further than what is there now",
        },
        headers={
            "Accept": f"{SSE}: server-sent events",
            "Last-Event-ID": "of server-sent events: the last one that arrived",
        },
    ),
    Route(
        method="POST",
        path="/v1/jobs/{id}/stdin",
        name="stdin",
        takes=BINARY,
        status=(204,),
        text="feed an interactive job; the reply comes when its pipe has taken all of it",
        query={"eof": "1: and that was the end"},
    ),
    Route(
        method="POST",
        path="/v1/jobs/{id}/signal",
        name="signal",
        text="end, freeze or resize",
        takes=SignalRequest,
        status=(204,),
    ),
    Route(
        method="POST",
        path="/v1/batches",
        name="submit_batch",
        text="submit many jobs at once",
        takes=BatchSubmission,
        gives=BatchView,
        status=(202, 200),
        query={"wait": "1: the reply is its events, and closing the connection cancels it"},
        headers={
            "Idempotency-Key": "the same key and body again give the batch that there is",
            "Accept": f"with wait=1, {SSE}: server-sent events",
            "traceparent": "W3C Trace Context; it is in the views of its jobs and in the log",
        },
    ),
    Route(
        method="GET",
        path="/v1/batches/{id}",
        name="batch",
        text="a batch, and how its cases are",
        gives=BatchView,
    ),
    Route(
        method="DELETE",
        path="/v1/batches/{id}",
        name="cancel_batch",
        text="cancel what is left of a batch",
        gives=BatchView,
        status=(202,),
    ),
    Route(
        method="GET",
        path="/v1/batches/{id}/events",
        name="batch_events",
        text="its cases with their results, in their order, each as soon as it is over",
        gives=NDJSON,
        query={
            "from": "the first case wanted",
            "follow": "0: no further than what is there now",
        },
        headers={
            "Accept": f"{SSE}: server-sent events",
            "Last-Event-ID": "of server-sent events: the last one that arrived",
        },
    ),
    *_together("group", GroupSubmission, GroupView, "jobs that reach each other"),
    *_together("pipeline", PipelineSubmission, PipelineView, "jobs that are joined by pipes"),
    Route(
        method="PUT",
        path="/v1/files/{sha256}",
        name="put_file",
        text="store a file",
        takes=BINARY,
        gives=FileView,
        status=(201, 200),
    ),
    Route(
        method="GET",
        path="/v1/files/{sha256}",
        name="get_file",
        gives=BINARY,
        text="a file that you stored, or that a job of yours left",
    ),
    Route(
        method="GET",
        path="/v1/policies",
        name="policies",
        gives=list[PolicyView],
        text="the policies that can be named",
    ),
    Route(method="GET", path="/v1/info", name="info", text="the daemon", gives=Info),
    Route(
        method="GET",
        path="/v1/overview",
        name="overview",
        gives=Overview,
        text="what waits, what runs and what it uses, and how jobs ended",
        query={"every": "of a stream: milliseconds between two looks; 1000 by default"},
        headers={"Accept": f"{SSE} or {NDJSON}: again and again"},
    ),
    Route(
        method="GET",
        path="/ui",
        name="ui",
        gives="text/html",
        text="the same as a page for a browser",
        open=True,
    ),
    Route(
        method="GET",
        path="/healthz",
        name="healthz",
        text="whether it lives",
        gives=TEXT,
        open=True,
    ),
    Route(
        method="GET",
        path="/readyz",
        name="readyz",
        text="whether it takes jobs",
        gives=TEXT,
        status=(200, 503),
        open=True,
    ),
    Route(method="GET", path="/metrics", name="metrics", text="for Prometheus", gives=TEXT),
    Route(
        method="GET",
        path="/openapi.json",
        name="openapi",
        text="this description",
        gives=dict[str, Any],
        open=True,
    ),
)


_PLAIN = {
    one.parts: tuple(route for route in ROUTES if route.path == one.path)
    for one in ROUTES
    if "{" not in one.path
}


def matching(path: tuple[str, ...]) -> list[tuple[Route, dict[str, str]]]:
    """The routes of a path, and the values of the {names} in it."""
    plain = _PLAIN.get(path)
    if plain is not None:
        return [(one, {}) for one in plain]
    return [(one, names) for one in ROUTES if (names := one.match(path)) is not None]


class StreamView(msgspec.Struct, frozen=True, kw_only=True):
    """A stream in a record: `data` where it is UTF-8, else `data_b64`; the tail likewise."""

    bytes: int
    kept: int
    truncated: bool
    sha256: str
    data: str | msgspec.UnsetType = msgspec.UNSET
    data_b64: str | msgspec.UnsetType = msgspec.UNSET
    tail: str | msgspec.UnsetType = msgspec.UNSET
    tail_b64: str | msgspec.UnsetType = msgspec.UNSET


class EventView(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the events."""

    v: int
    seq: int
    type: str
    member: str | msgspec.UnsetType = msgspec.UNSET
    """Whose it is, of jobs that run together."""
    data: str | msgspec.UnsetType = msgspec.UNSET
    data_b64: str | msgspec.UnsetType = msgspec.UNSET
    usage: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    result: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


def openapi() -> dict[str, Any]:
    """OpenAPI 3.1, from the routes and the types."""
    types = [one for route in ROUTES for one in (route.takes, route.gives) if _is_type(one)]
    named = [*types, Result, Event, StreamView, EventView, ProblemView]
    _, schemas = msgspec.json.schema_components(named, ref_template="#/components/schemas/{name}")
    found: dict[str, Any] = dict(sorted(schemas.items()))
    found["Output"] = found.pop("StreamView")
    found["Event"] = found.pop("EventView")
    found["Artifact"]["properties"].pop("data")
    found["Result"]["properties"]["schema"] = {"const": SCHEMA}
    record = {"anyOf": [{"$ref": "#/components/schemas/Result"}, _FAILURE, {"type": "null"}]}
    found["JobView"]["properties"]["result"] = record
    paths: dict[str, Any] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "sandboxd", "version": sandboxd.__version__},
        "paths": paths,
        "components": {
            "schemas": found,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}, {}],
    }


_FAILURE = {
    "type": "object",
    "required": ["schema", "status", "error"],
    "properties": {
        "schema": {"const": SCHEMA},
        "status": {"const": "error"},
        "error": {"type": "object"},
    },
}


def _is_type(value: Any) -> bool:
    return value is not None and not isinstance(value, str)


def _content(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {value: {"schema": {"type": "string"}}}
    template = "#/components/schemas/{name}"
    (schema,), _ = msgspec.json.schema_components([value], ref_template=template)
    return {"application/json": {"schema": schema}}


def _parameters(route: Route) -> Iterator[dict[str, Any]]:
    for name in re.findall(r"{(\w+)}", route.path):
        schema = {"type": "string", "pattern": DIGEST if name == "sha256" else NAME}
        yield {"name": name, "in": "path", "required": True, "schema": schema}
    for where, found in (("query", route.query), ("header", route.headers)):
        for name, text in found.items():
            if name != "Accept":  # OpenAPI says that it is to be left out
                schema = {
                    "type": "string",
                    **({"pattern": KEY} if name == "Idempotency-Key" else {}),
                }
                yield {"name": name, "in": where, "description": text, "schema": schema}


def _operation(route: Route) -> dict[str, Any]:
    good: dict[str, Any] = {"description": route.text}
    if route.gives is not None:
        good["content"] = _content(route.gives)
        if route.name in STREAMS:
            good["content"] |= _content(NDJSON) | _content(SSE)
    problem = {"schema": {"$ref": "#/components/schemas/ProblemView"}}
    bad = {"description": "why not", "content": {"application/problem+json": problem}}
    found = {
        "operationId": route.name,
        "summary": route.text,
        "parameters": list(_parameters(route)),
        "responses": {**{str(one): good for one in route.status}, "default": bad},
    }
    if route.takes is not None:
        found["requestBody"] = {"required": True, "content": _content(route.takes)}
    if route.open:
        found["security"] = [{}]
    return found
