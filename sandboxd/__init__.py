"""sandboxd runs untrusted programs on Linux without root, and says what was really enforced.

Everything public is a name of this module, loaded when it is first used.
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False  # as typing's, which costs programs of launch/ too much to import
if TYPE_CHECKING:
    from typing import Any

    from sandboxd.errors import (
        Busy,
        HostError,
        ImageError,
        InternalError,
        JobError,
        LaunchError,
        PolicyError,
        PolicyErrors,
        SandboxError,
        WorkloadFailed,
    )
    from sandboxd.group import Group, Member
    from sandboxd.job import File, Job, Pattern, Pipe, Tar, Terminal
    from sandboxd.policy import Artifacts, Limits, Policy
    from sandboxd.reference import Reference
    from sandboxd.result import Artifact, Event, Kept, Output, Result, Usage, to_json
    from sandboxd.serve.client import Client, connect
    from sandboxd.serve.joined import ClientGroup, ClientPipeline
    from sandboxd.serve.remote import ClientRun
    from sandboxd.serve.tls import Trust
    from sandboxd.supervise.asking import RunnerStatistics
    from sandboxd.supervise.builds import Build
    from sandboxd.supervise.bundles import load_bundle
    from sandboxd.supervise.group_files import load_group
    from sandboxd.supervise.groups import GroupRun
    from sandboxd.supervise.keeping import Change, KeptRoot, commit, find_kept, kept_roots
    from sandboxd.supervise.leavings import OpenArtifact
    from sandboxd.supervise.oneshot import run, run_sync
    from sandboxd.supervise.pipeline import Pipeline
    from sandboxd.supervise.policies import find as find_policy
    from sandboxd.supervise.run import Run
    from sandboxd.supervise.runner import Runner, open_runner

_HOMES = {
    "errors": (
        "Busy", "HostError", "ImageError", "InternalError", "JobError", "LaunchError",
        "PolicyError", "PolicyErrors", "SandboxError", "WorkloadFailed",
    ),
    "group": ("Group", "Member"),
    "job": ("File", "Job", "Pattern", "Pipe", "Tar", "Terminal"),
    "policy": ("Artifacts", "Limits", "Policy"),
    "reference": ("Reference",),
    "result": ("Artifact", "Event", "Kept", "Output", "Result", "Usage", "to_json"),
    "serve.client": ("Client", "connect"),
    "serve.joined": ("ClientGroup", "ClientPipeline"),
    "serve.remote": ("ClientRun",),
    "serve.tls": ("Trust",),
    "supervise.builds": ("Build",),
    "supervise.bundles": ("load_bundle",),
    "supervise.group_files": ("load_group",),
    "supervise.groups": ("GroupRun",),
    "supervise.pipeline": ("Pipeline",),
    "supervise.keeping": ("Change", "KeptRoot", "commit", "find_kept", "kept_roots"),
    "supervise.leavings": ("OpenArtifact",),
    "supervise.oneshot": ("run", "run_sync"),
    "supervise.run": ("Run",),
    "supervise.asking": ("RunnerStatistics",),
    "supervise.runner": ("Runner", "open_runner"),
}  # fmt: skip
_WHERE = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Artifact", "Artifacts", "Build", "Busy", "Change", "Client", "ClientGroup",
    "ClientPipeline", "ClientRun", "Event", "File", "Group", "GroupRun", "HostError",
    "ImageError", "InternalError", "Job", "JobError", "Kept", "KeptRoot", "LaunchError",
    "Limits", "Member", "OpenArtifact", "Output", "Pattern", "Pipe", "Pipeline", "Policy",
    "PolicyError", "PolicyErrors", "Reference", "Result", "Run", "Runner", "RunnerStatistics",
    "SandboxError", "Tar", "Terminal", "Trust", "Usage", "WorkloadFailed", "__version__",
    "commit", "connect", "find_kept", "find_policy", "kept_roots", "load_bundle", "load_group",
    "open_runner", "run", "run_sync", "to_json",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562), so that importing costs next to nothing."""
    import importlib

    if name == "find_policy":
        return importlib.import_module("sandboxd.supervise.policies").find
    if name not in _WHERE:
        raise AttributeError(f"module 'sandboxd' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"sandboxd.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
