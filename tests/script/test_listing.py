"""A script as text: a golden script, and that no step of a plan is left unnamed."""

from __future__ import annotations

import pytest

from sandboxd import plan
from sandboxd.script.init import exec_script, setup_image
from sandboxd.script.listing import listing
from sandboxd.script.numbers import ARCHITECTURES, numbers
from sandboxd.script.record import NO_CALL, Assembler, Condition
from sandboxd.script.zygote import tenant_image

IDS = plan.IdMap(writer="self", uids=((0, 1000, 1),), gids=((0, 1000, 1),))
TENANT = plan.TenantPlan(
    ids=IDS,
    steps=(
        plan.UserNamespace(ids=IDS),
        plan.Namespaces(flags=plan.namespaces("pid", "mount")),
        plan.OpenTree(source="/usr", slot=0),
        plan.Tmpfs(target="/tmp", size=4096),
        plan.MakeFile(path="/tmp/etc/hosts", content=b'a "b"\n\xff' + bytes(100)),
        plan.Attach(slot=0, source="/usr", target="/tmp/usr"),
        plan.Pivot(root="/tmp"),
        plan.NoNewPrivileges(),
    ),
)
WANTED = {
    0: ["unshare(CLONE_NEWUSER)", '"/proc/self/uid_map", O_WRONLY|O_CLOEXEC, 0)',
        ', "0 1000 1\\n", 9)'],
    1: ["clone(CLONE_NEWMOUNT|CLONE_NEWPID|17, 0, 0, 0, 0, 0)  if zero go to #"],
    2: ['open_tree(AT_FDCWD, "/usr", OPEN_TREE_CLONE|AT_RECURSIVE|O_CLOEXEC)  -> #', "dup3(<#"],
    3: ['mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID|MS_NODEV, "mode=755,size=4096")'],
    4: ['"/tmp/etc/hosts", O_WRONLY|O_CREAT|O_CLOEXEC, 0o644)',
        ', "a \\"b\\"\\n\\xff\\x00', '"..., 107)'],
    5: ['mount_setattr(100, "", AT_EMPTY_PATH|AT_RECURSIVE, {0x7, 0x0, 0x0, 0x0}, 32)',
        'move_mount(100, "", AT_FDCWD, "/tmp/usr", 4)'],
    6: ['pivot_root(".", ".")', 'umount2(".", 2)', 'chdir("/")'],
    7: ["prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)"],
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_tenant(arch: str) -> None:
    lines = list(listing(tenant_image(arch, TENANT), arch))
    for step, pieces in WANTED.items():
        text = "\n".join(line for tag, line in lines if tag == step)
        for piece in pieces:
            assert piece in text
    assert any("clone3(" in line for tag, line in lines if tag < 0)
    assert "dup3(<socket>, 3, 0)  may fail" in lines[0][1]


def test_a_setup_script_names_what_is_put_in() -> None:
    steps = (
        plan.MakeDir(path="/box", for_job=True),
        plan.SetLimit(resource="STACK", soft=1, hard=None),
    )
    setup = plan.SetupPlan(
        steps=steps,
        namespaces=0,
        descriptors=("socket",),
        cgroup=False,
        own_uid=True,
        landlock=False,
    )
    text = "\n".join(line for _, line in listing(setup_image("x86_64", setup), "x86_64"))
    assert 'fchownat(AT_FDCWD, "/box", <uid>, <uid>, 0)' in text
    assert "prlimit64(0, RLIMIT_STACK, {0x1, unlimited}, 0)  may fail" in text


def test_an_exec_script_shows_its_words() -> None:
    start = plan.Exec(
        programs=(b"/usr/bin/echo",), argv=(b"echo", *[b"w"] * 9), env=(b"A=\xff",),
        landlock=False, terminal=False, time_namespace=False,
    )  # fmt: skip
    steps = plan.ExecPlan(steps=(plan.ChangeDir(path=b"/box"), start))
    image, content = exec_script("x86_64", steps)
    image = image._replace(content=content, memory=len(content), marks={})
    text = "\n".join(line for _, line in listing(image, "x86_64"))
    words = ", ".join(['"echo"', *['"w"'] * 7])
    assert f'execve("/usr/bin/echo", [{words}, ...], ["A=\\xff"])' in text
    assert 'chdir("/box")' in text


def test_conditions_and_places() -> None:
    asm = Assembler()
    cell = asm.cell(7)
    first = asm.emit(numbers("x86_64")["getppid"], store=cell, ignore=True)
    asm.emit(NO_CALL, 0, when=Condition.EQUAL, compare=cell, target=first)
    asm.emit(NO_CALL, -5, store=first.field("a3"))
    asm.emit(99999, 1 << 40)
    asm.jump(first)
    lines = [line for _, line in listing(asm.finish((0, 0, first)), "x86_64")]
    assert lines == [
        "#0    getppid()  -> &220  may fail",
        "#1    0  if equal &220 go to #0",
        "#2    -5  -> #0.a3",
        "#3    syscall_99999(0x10000000000, 0, 0, 0, 0, 0)",
        "#4    0  go to #0",
    ]
