"""The named groups of system calls and of rules that a policy's [syscalls] is written with.

A group of calls ("@keyring") stands in allow, deny and the other lists, or in a rule's `calls`; a
group of rules ("@sockets") stands in `rules`. What a group of rules does not mention is left to the
lists, so the order of groups hardly ever matters. Both are data: `sandboxd policy explain` and the
reference print them from here. A call that exists on another architecture only is skipped where it
does not, so a group is written once for x86-64, aarch64 and, where a policy admits it, i386.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from types import MappingProxyType

import msgspec

from sandboxd.compile.numbers import names
from sandboxd.errors import PolicyError
from sandboxd.policy import Argument, Rule


class Group(msgspec.Struct, frozen=True):
    """System calls that belong together. `members` are calls and, with "@", other groups."""

    purpose: str
    members: tuple[str, ...]


class RuleGroup(msgspec.Struct, frozen=True):
    """Rules that belong together. A string among `rules` is another group of rules."""

    purpose: str
    rules: tuple[Rule | str, ...]


def _group(purpose: str, members: str) -> Group:
    return Group(purpose, tuple(members.split()))


GROUPS: Mapping[str, Group] = MappingProxyType(
    {
        "@base": _group(
            "what every normal program needs; without creating sockets and without locks",
            "@files @xattr @memory @processes @ids @signals @time @events @inotify @socket-io @ipc"
            " @aio @io-sched @landlock @abi32",
        ),
        "@files": _group(
            "open, read, write, rename, stat and other work on files and descriptors",
            "access cachestat chdir chmod chown close close_range copy_file_range creat dup dup2"
            " dup3 faccessat faccessat2 fadvise64 fallocate fchdir fchmod fchmodat fchmodat2 fchown"
            " fchownat fcntl fdatasync file_getattr file_setattr fstat fstatfs fsync ftruncate"
            " futimesat getcwd getdents getdents64 ioctl lchown link linkat lseek lstat mkdir"
            " mkdirat mknod mknodat newfstatat open openat openat2 pipe pipe2 pread64 preadv"
            " preadv2 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv rename"
            " renameat renameat2 rmdir sendfile stat statfs statx symlink symlinkat"
            " sync_file_range syncfs truncate umask unlink unlinkat utime utimensat utimes write"
            " writev",
        ),
        "@xattr": _group(
            "extended attributes of files",
            "fgetxattr flistxattr fremovexattr fsetxattr getxattr getxattrat lgetxattr listxattr"
            " listxattrat llistxattr lremovexattr lsetxattr removexattr removexattrat setxattr"
            " setxattrat",
        ),
        "@memory": _group(
            "mapping, protecting, locking and sharing memory",
            "brk madvise map_shadow_stack membarrier memfd_create mincore mlock mlock2 mlockall"
            " mmap mprotect mremap mseal msync munlock munlockall munmap pkey_alloc pkey_free"
            " pkey_mprotect remap_file_pages",
        ),
        "@processes": _group(
            "starting, scheduling and waiting for processes and threads; futexes; limits",
            "arch_prctl capget capset clone execve execveat exit exit_group fork futex"
            " futex_requeue futex_wait futex_waitv futex_wake get_robust_list getcpu getpgid"
            " getpgrp getpid getppid getpriority getrandom getrlimit getrusage getsid gettid"
            " pidfd_open pidfd_send_signal prctl prlimit64 restart_syscall rseq"
            " sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr"
            " sched_getparam sched_getscheduler sched_rr_get_interval sched_setaffinity"
            " sched_setattr sched_setparam sched_setscheduler sched_yield seccomp set_robust_list"
            " set_tid_address setpgid setpriority setrlimit setsid sysinfo times uname uprobe"
            " uretprobe vfork wait4 waitid",
        ),
        "@ids": _group(
            "asking for and changing the own user and group ids",
            "getegid geteuid getgid getgroups getresgid getresuid getuid setfsgid setfsuid setgid"
            " setgroups setregid setresgid setresuid setreuid setuid",
        ),
        "@signals": _group(
            "sending, blocking and handling signals",
            "kill pause rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn"
            " rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo sigaltstack signalfd signalfd4 tgkill"
            " tkill",
        ),
        "@time": _group(
            "reading clocks, sleeping, timers",
            "alarm clock_getres clock_gettime clock_nanosleep getitimer gettimeofday nanosleep"
            " setitimer time timer_create timer_delete timer_getoverrun timer_gettime timer_settime"
            " timerfd_create timerfd_gettime timerfd_settime",
        ),
        "@events": _group(
            "waiting for many descriptors at once",
            "epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd"
            " eventfd2 poll ppoll pselect6 select",
        ),
        "@inotify": _group(
            "watching files for changes",
            "inotify_add_watch inotify_init inotify_init1 inotify_rm_watch",
        ),
        "@socket-io": _group(
            "using sockets; which may be created is what the @sockets-... rules say",
            "accept accept4 bind connect getpeername getsockname getsockopt listen recvfrom"
            " recvmmsg recvmsg sendmmsg sendmsg sendto setsockopt shutdown",
        ),
        "@socket-create": _group(
            "creating sockets; the @sockets-... rules admit some kinds", "socket socketpair"
        ),
        "@ipc": _group(
            "System V and POSIX message queues, semaphores and shared memory",
            "mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink msgctl msgget"
            " msgrcv msgsnd semctl semget semop semtimedop shmat shmctl shmdt shmget",
        ),
        "@aio": _group(
            "the older asynchronous I/O of databases",
            "io_cancel io_destroy io_getevents io_pgetevents io_setup io_submit",
        ),
        "@io-sched": _group("I/O priorities", "ioprio_get ioprio_set"),
        "@landlock": _group(
            "further restricting oneself; sandboxd itself needs it after the filter is loaded",
            "landlock_add_rule landlock_create_ruleset landlock_restrict_self",
        ),
        "@abi32": _group(
            'names that only 32-bit programs use for harmless calls (abi32 = "allow")',
            "_llseek _newselect chown32 clock_getres_time64 clock_gettime64 clock_nanosleep_time64"
            " fadvise64_64 fchown32 fcntl64 fstat64 fstatat64 fstatfs64 ftruncate64 futex_time64"
            " get_thread_area getegid32 geteuid32 getgid32 getgroups32 getresgid32 getresuid32"
            " getuid32 io_pgetevents_time64 ipc lchown32 lstat64 mmap2 mq_timedreceive_time64"
            " mq_timedsend_time64 nice oldfstat oldlstat oldolduname oldstat olduname"
            " ppoll_time64 pselect6_time64 readdir recvmmsg_time64 rt_sigtimedwait_time64"
            " sched_rr_get_interval_time64 semtimedop_time64 sendfile64 set_thread_area setfsgid32"
            " setfsuid32 setgid32 setgroups32 setregid32 setresgid32 setresuid32 setreuid32"
            " setuid32 sgetmask sigaction signal sigpending sigprocmask sigreturn sigsuspend"
            " ssetmask stat64 statfs64 timer_gettime64 timer_settime64 timerfd_gettime64"
            " timerfd_settime64 truncate64 ugetrlimit utimensat_time64 waitpid",
        ),
        "@locks": _group(
            "whole-file locks; fcntl's locks are in @base, and the @no-locks rules refuse them",
            "flock",
        ),
        "@ptrace": _group(
            "debugging: reading and controlling other processes of the sandbox",
            "kcmp pidfd_getfd process_vm_readv process_vm_writev ptrace",
        ),
        "@splice": _group("moving data between pipes without copying", "splice tee vmsplice"),
        "@numa": _group(
            "placing memory on NUMA nodes",
            "mbind migrate_pages move_pages set_mempolicy set_mempolicy_home_node",
        ),
        "@numa-query": _group("asking where memory would be placed", "get_mempolicy"),
        "@ldt": _group("changing x86 segment descriptors: Wine, old Go programs", "modify_ldt"),
        "@dangerous": _group(
            "what no job needs and many exploits do; answered with EPERM, which programs expect",
            "@namespaces @mount @keyring @modules @clock-set @reboot @swap @bpf @perf @userfaultfd"
            " @handles @fanotify @admin @personality",
        ),
        "@namespaces": _group(
            "namespaces of one's own (clone and clone3: see the @no-namespaces rules)",
            "setns unshare",
        ),
        "@mount": _group(
            "mounting, and changing the root",
            "chroot fsconfig fsmount fsopen fspick mount mount_setattr move_mount open_tree"
            " open_tree_attr pivot_root umount umount2",
        ),
        "@keyring": _group(
            "the kernel's keyrings: their quota is shared by a whole user",
            "add_key keyctl request_key",
        ),
        "@modules": _group(
            "loading code into the kernel",
            "create_module delete_module finit_module get_kernel_syms init_module query_module",
        ),
        "@clock-set": _group(
            "setting the machine's clocks",
            "adjtimex clock_adjtime clock_adjtime64 clock_settime clock_settime64 settimeofday"
            " stime",
        ),
        "@reboot": _group("restarting the machine", "kexec_file_load kexec_load reboot"),
        "@swap": _group("swap space", "swapoff swapon"),
        "@bpf": _group("programs for the kernel's BPF machine", "bpf"),
        "@perf": _group("performance counters", "perf_event_open"),
        "@userfaultfd": _group("page faults handled in user space", "userfaultfd"),
        "@io-uring": _group(
            "io_uring: system calls that no filter sees",
            "io_uring_enter io_uring_register io_uring_setup",
        ),
        "@handles": _group(
            "opening files past their directories",
            "name_to_handle_at open_by_handle_at",
        ),
        "@fanotify": _group("watching whole file systems", "fanotify_init fanotify_mark"),
        "@admin": _group(
            "administration of the machine",
            "acct ioperm iopl lookup_dcookie quotactl quotactl_fd setdomainname sethostname syslog"
            " vhangup",
        ),
        "@personality": _group(
            "emulating other systems (see the @personality-... rules for harmless values)",
            "personality",
        ),
        "@rare": _group(
            "harmless as far as known, but hardly any program needs them",
            "listmount listns lsm_get_self_attr lsm_list_modules lsm_set_self_attr memfd_secret"
            " process_madvise process_mrelease statmount",
        ),
        "@sync": _group("writing back every file system of the machine", "sync"),
        "@obsolete": _group(
            "no longer in the kernel, or of no use to anything built this century",
            "_sysctl afs_syscall bdflush break epoll_ctl_old epoll_wait_old ftime getpmsg gtty idle"
            " lock mpx nfsservctl prof profil putpmsg security socketcall stty sysfs tuxcall ulimit"
            " uselib ustat vm86 vm86old vserver",
        ),
        "@init": _group(
            "what sandboxd's own first process in a sandbox uses under the filter",
            "chdir clock_gettime clone close close_range dup3 execve execveat exit exit_group fcntl"
            " getcwd getrusage ioctl kill landlock_restrict_self madvise openat ppoll prctl"
            " pread64 prlimit64 read recvfrom recvmsg rt_sigprocmask rt_sigtimedwait sendmsg"
            " sendto setsid statfs wait4 waitid write",
        ),
    }
)

LAUNCH = frozenset(
    _group(
        "what a sandbox is made with, before its own filter is loaded: script/numbers.py",
        "capset chdir clock_gettime clone clone3 close close_range dup3 execve exit_group"
        " fchmodat fchownat fcntl getppid getrusage ioctl kill landlock_add_rule"
        " landlock_create_ruleset landlock_restrict_self madvise mkdirat mount mount_setattr"
        " move_mount open_tree openat openat2 pivot_root ppoll prctl pread64 prlimit64 read"
        " recvfrom recvmsg rt_sigaction rt_sigprocmask rt_sigtimedwait seccomp sendmsg sendto"
        " setgroups sethostname setns setresgid setresuid setsid socket statfs symlinkat umask"
        " umount2 unlinkat unshare wait4 waitid write",
    ).members
)

# Values of the kernel's own headers: linux/sched.h, bits/socket.h, linux/netlink.h, linux/in.h,
# asm-generic/ioctls.h, asm-generic/fcntl.h, asm-generic/resource.h, linux/personality.h,
# linux/prctl.h, asm-generic/mman-common.h. They are the same on x86-64, i386 and aarch64.
_CLONE_NEW = 0x7E020000
"""NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET; clone has no NEWTIME (clone(2))."""
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16
_SOCK_STREAM, _SOCK_DGRAM = 1, 2
_SOCK_TYPE_MASK = 0xF
"""The type without SOCK_CLOEXEC and SOCK_NONBLOCK (linux/net.h)."""
_NETLINK_ROUTE, _NETLINK_SOCK_DIAG, _NETLINK_GENERIC = 0, 4, 16
_IPPROTO_ICMP, _IPPROTO_TCP, _IPPROTO_UDP, _IPPROTO_ICMPV6 = 1, 6, 17, 58
_TIOCSTI, _TIOCLINUX, _TIOCSETD = 0x5412, 0x541C, 0x5423
_F_SETLEASE, _F_NOTIFY = 1024, 1026
_F_GETLK, _F_SETLK = (5, 12, 36), (6, 7, 13, 14, 37, 38)
"""For 32-bit offsets, for 64-bit ones in 32-bit programs (12 to 14), and OFD locks."""
_RLIMIT_CORE = 4
_PR_SET_MEMORY_MERGE, _MADV_MERGEABLE = 67, 12
_PERSONALITY_QUERY, _ADDR_NO_RANDOMIZE = 0xFFFFFFFF, 0x0040000


def _eq(index: int, value: int) -> Argument:
    return Argument(index=index, op="eq", value=value)


_SOCKET = ("socket", "socketpair")
_FCNTL = ("fcntl", "fcntl64")


def _socket(family: int, kind: int, protocol: int) -> Rule:
    a_type = Argument(index=1, op="eq", value=kind, mask=_SOCK_TYPE_MASK)
    return Rule(calls=_SOCKET, args=(_eq(0, family), a_type, _eq(2, protocol)))


def _netlink(protocol: int) -> Rule:
    return Rule(calls=("socket",), args=(_eq(0, _AF_NETLINK), _eq(2, protocol)))


def _refuse(calls: tuple[str, ...], *args: Argument) -> Rule:
    return Rule(calls=calls, args=args, action="eperm")


RULES: Mapping[str, RuleGroup] = MappingProxyType(
    {
        "@sockets": RuleGroup(
            "sockets of the local machine, TCP, UDP and ping; asking about interfaces",
            ("@sockets-unix", "@sockets-inet", "@sockets-route", "@no-socketcall"),
        ),
        "@sockets-unix": RuleGroup(
            "unix sockets", (Rule(calls=_SOCKET, args=(_eq(0, _AF_UNIX),)),)
        ),
        "@sockets-inet": RuleGroup(
            "IPv4 and IPv6: TCP, UDP and unprivileged ping (icmp(7))",
            tuple(
                _socket(family, kind, protocol)
                for family, ping in ((_AF_INET, _IPPROTO_ICMP), (_AF_INET6, _IPPROTO_ICMPV6))
                for kind, protocols in (
                    (_SOCK_STREAM, (0, _IPPROTO_TCP)),
                    (_SOCK_DGRAM, (0, _IPPROTO_UDP, ping)),
                )
                for protocol in protocols
            ),
        ),
        "@sockets-route": RuleGroup(
            "netlink for interfaces and addresses: getifaddrs(3)", (_netlink(_NETLINK_ROUTE),)
        ),
        "@sockets-diag": RuleGroup(
            "netlink for socket lists (ss) and generic netlink",
            (_netlink(_NETLINK_SOCK_DIAG), _netlink(_NETLINK_GENERIC)),
        ),
        "@no-socketcall": RuleGroup(
            "not i386's call for all socket calls: its arguments lie where no filter can look",
            (Rule(calls=("socketcall",), action="enosys"),),
        ),
        "@no-namespaces": RuleGroup(
            "no namespaces from clone; clone3 keeps its flags in memory, so libc must use clone",
            (
                _refuse(("clone",), Argument(index=0, op="any_bits", value=_CLONE_NEW)),
                Rule(calls=("clone3",), action="enosys"),
            ),
        ),
        "@no-locks": RuleGroup(
            "a file lock succeeds and locks nothing, asking for one is refused: on files that jobs"
            " share, locks would be a channel between them",
            (
                # Refused locks break SQLite, and Java complains about them on stdout.
                Rule(calls=("flock",), action="success"),
                *(_refuse(_FCNTL, _eq(1, command)) for command in _F_GETLK),
                *(
                    Rule(calls=_FCNTL, args=(_eq(1, command),), action="success")
                    for command in _F_SETLK
                ),
            ),
        ),
        "@personality-query": RuleGroup(
            "asking for the personality, and setting the normal one",
            tuple(
                Rule(calls=("personality",), args=(_eq(0, value),))
                for value in (_PERSONALITY_QUERY, 0)
            ),
        ),
        "@personality-aslr": RuleGroup(
            "switching address space randomization off: debuggers",
            (Rule(calls=("personality",), args=(_eq(0, _ADDR_NO_RANDOMIZE),)),),
        ),
        "@no-tty-injection": RuleGroup(
            "no typing into a terminal (TIOCSTI, TIOCLINUX), no line disciplines (TIOCSETD)",
            tuple(
                _refuse(("ioctl",), _eq(1, command))
                for command in (_TIOCSTI, _TIOCLINUX, _TIOCSETD)
            ),
        ),
        "@no-leases": RuleGroup(
            "no leases and directory signals: a lease stalls whoever opens the file next",
            tuple(_refuse(_FCNTL, _eq(1, command)) for command in (_F_SETLEASE, _F_NOTIFY)),
        ),
        "@core-limit": RuleGroup(
            "changing RLIMIT_CORE changes nothing but succeeds: sanitizers insist on it",
            (
                # With a place for the old limit the kernel must answer, to fill it in.
                Rule(
                    calls=("prlimit64",),
                    args=(
                        _eq(1, _RLIMIT_CORE),
                        Argument(index=2, op="ne", value=0, width=64),
                        Argument(index=3, op="eq", value=0, width=64),
                    ),
                    action="success",
                ),
                Rule(calls=("setrlimit",), args=(_eq(0, _RLIMIT_CORE),), action="success"),
            ),
        ),
        "@no-sync": RuleGroup(
            "sync and syncfs, which write back other people's data, succeed without doing it",
            (Rule(calls=("sync", "syncfs"), action="success"),),
        ),
        "@own-limits": RuleGroup(
            "resource limits may be changed for the calling process only",
            (
                # init has the job's user and would die of a CPU limit set for it: prlimit(2).
                Rule(
                    calls=("prlimit64",),
                    args=(
                        Argument(index=0, op="ne", value=0),
                        Argument(index=2, op="ne", value=0, width=64),
                    ),
                    action="eperm",
                ),
            ),
        ),
        "@no-flow-labels": RuleGroup(
            "IPv6 flow labels outlive their sockets, in the network namespace",
            # setsockopt(IPPROTO_IPV6, IPV6_FLOWLABEL_MGR), include/uapi/linux/in6.h
            (Rule(calls=("setsockopt",), args=(_eq(1, 41), _eq(2, 32)), action="eperm"),),
        ),
        "@no-merging": RuleGroup(
            "memory is not offered for merging: its timing would tell what others have in theirs",
            (
                _refuse(("prctl",), _eq(0, _PR_SET_MEMORY_MERGE)),
                _refuse(("madvise",), _eq(2, _MADV_MERGEABLE)),
            ),
        ),
        "@guards": RuleGroup(
            "small holes in otherwise harmless calls, closed",
            (
                *("@no-tty-injection", "@no-leases", "@own-limits", "@core-limit"),
                *("@personality-query", "@no-sync", "@no-flow-labels", "@no-merging"),
            ),
        ),
    }
)


def unknown(name: str, known: Iterable[str], where: str) -> PolicyError:
    """The error for a name that means nothing, with the names it might have been."""
    import difflib

    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else ""
    what = "group" if name.startswith("@") else "system call"
    return PolicyError(where, f"unknown {what} {name!r}", hint=hint)


@cache
def members(name: str) -> tuple[str, ...]:
    """The calls that a known group of calls comes to, groups within it resolved, each once."""
    found: dict[str, None] = {}
    for member in GROUPS[name].members:
        found.update(dict.fromkeys(members(member) if member.startswith("@") else (member,)))
    return tuple(found)


def calls(name: str, where: str, *, near: bool = True) -> tuple[str, ...]:
    """The calls that a name in a policy means: one, or those of a group.

    An error names what is near, unless nobody wants to know: looking takes a millisecond.
    """
    if name in GROUPS:
        return members(name)
    if name in names():
        return (name,)
    if name in RULES:
        hint = "write it into syscalls.rules"
        raise PolicyError(where, f"{name} is a group of rules, not of system calls", hint=hint)
    known = GROUPS if name.startswith("@") else names()
    raise unknown(name, known if near else (), where)


def rules(entry: Rule | str, where: str, *, near: bool = True) -> tuple[Rule, ...]:
    """The rules that an entry of syscalls.rules means: itself, or those of a group."""
    if isinstance(entry, Rule):
        return (entry,)
    if entry in RULES:
        inner = RULES[entry].rules
        return tuple(rule for one in inner for rule in rules(one, where))
    if entry in GROUPS or entry in names():
        what = "a group of system calls" if entry in GROUPS else "a system call"
        hint = "write it into syscalls.allow or another list of calls"
        raise PolicyError(where, f"{entry} is {what}, not a group of rules", hint=hint)
    raise unknown(entry, RULES if near else (), where)
