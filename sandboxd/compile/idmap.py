"""Who the tenant and its jobs are: the id maps a host allows, and the ids a policy asks for."""

from __future__ import annotations

from sandboxd import plan
from sandboxd.host import Host
from sandboxd.plan import IdMap
from sandboxd.policy import Identity

DEFAULT_UID = 1000
"""What a job is seen as where it cannot have a uid of its own."""
MAP_SIZE = 65536
_ROOM = 2 * plan.FIRST_JOB_UID
"""As many ids are left for runs, at least."""


def tenant_ids(host: Host) -> IdMap:
    """The map of a tenant's user namespace.

    With subordinate ids: 0 is the caller, 1.. are the caller's subordinate ids. As root nothing
    of the map is uid 0 outside: 0.. is the high range. Else the caller alone, as 0.
    """
    if host.direct_maps and host.subuid and host.subgid:
        return IdMap(
            writer="direct",
            uids=((0, host.subuid.start, host.subuid.count),),
            gids=((0, host.subgid.start, host.subgid.count),),
        )
    if host.subuid and host.subgid:
        count = min(host.subuid.count, host.subgid.count, MAP_SIZE)
        return IdMap(
            writer="newuidmap",
            uids=((0, host.uid, 1), (1, host.subuid.start, count)),
            gids=((0, host.gid, 1), (1, host.subgid.start, count)),
        )
    return IdMap(writer="self", uids=((0, host.uid, 1),), gids=((0, host.gid, 1),))


def first_job_uid(host: Host, ids: IdMap) -> int:
    """The lowest uid of the tenant's that runs have for their own.

    Above all owners of an image, if there is room, so that no run owns by chance what another
    would not.
    """
    highest = host.image.highest_id if host.image is not None else 0
    first = max(plan.FIRST_JOB_UID, highest + 1)
    return first if plan.FIRST_JOB_UID + ids.job_uids - first >= _ROOM else plan.FIRST_JOB_UID


def own_uid(identity: Identity, ids: IdMap) -> bool:
    """Whether each run gets a uid of the tenant that no other live run has."""
    return identity.user == "isolated" and ids.job_uids > 0


def needs_leaf(identity: Identity, ids: IdMap) -> bool:
    """Whether a last user namespace gives the ids seen inside."""
    return not own_uid(identity, ids) or identity.uid is not None


def steps(
    identity: Identity, ids: IdMap, quotas: tuple[tuple[str, int], ...], why: str
) -> tuple[plan.Step, ...]:
    """Become the job: its uid, and the leaf namespace where one is needed, with its quotas."""
    own = own_uid(identity, ids)
    outer = None if own else plan.TENANT_UID
    become = plan.BecomeUser(uid=outer, gid=outer, why=why)
    if not needs_leaf(identity, ids):
        return (become,)
    uid = DEFAULT_UID if identity.uid is None else identity.uid
    gid = uid if identity.gid is None else identity.gid
    leaf = plan.LeafUserNamespace(uid=uid, gid=gid, outer=outer, quotas=quotas, why=why)
    return (become, leaf)
