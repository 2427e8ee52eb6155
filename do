#!/bin/sh
# Everything a developer types, in one file: `./do help`. Any command may be repeated.
#
# What is missing gets installed: Debian packages only as root or by `sudo -n`, Python packages from
# requirements.lock into a virtual environment outside the checkout. Nothing is written into the
# checkout. What ./do itself says goes to stderr; stdin, stdout and the working directory belong to
# the command.
set -eu

EXAMPLE='judge examples/different examples/different/submissions/accepted/different.cpp'

# program:Debian package; the second list is what test, bench and fuzz want on top
RUN_NEEDS='newuidmap:uidmap fuse-overlayfs:fuse-overlayfs gcc:gcc g++:g++'
TEST_NEEDS='bwrap:bubblewrap crun:crun slirp4netns:slirp4netns objdump:binutils qemu-aarch64:qemu-user
    pasta:passt nft:nftables ip:iproute2 docker-registry:docker-registry skopeo:skopeo mmdebstrap:mmdebstrap
    umoci:umoci aarch64-linux-gnu-objdump:binutils-aarch64-linux-gnu chromium:chromium'
VM_NEEDS='newuidmap:uidmap mmdebstrap:mmdebstrap qemu-system-x86_64:qemu-system-x86
    qemu-img:qemu-utils mke2fs:e2fsprogs'

TEST_USER=sandboxd-test

usage() {
    cat <<'END'
./do run                     everything needed, then judges the example
./do run [FLAGS] -- CMD...   everything needed, then one sandboxed command
./do sandboxd ARGS...        the whole command line of sandboxd
./do test [PYTEST ARGS]      the tests; as root they run as the ordinary user sandboxd-test
./do check                   format, lint, types, policies
./do fmt                     formats and sorts imports
./do bench [ARGS]            the benchmarks, as the same user as the tests; network: of a way out;
                             serve: of the daemon
./do fuzz [NAME [ARGS]]      fuzz/NAME.py, or every file in fuzz/
./do vm [ARGS]               the tests in a virtual machine with cgroup v2 controllers (--help)
./do python ARGS...          Python that can import all of it: UPDATE=1 ./do python -m pytest tests
./do lock                    writes requirements.lock anew from pyproject.toml
PYTHON=/path/to/python3 chooses the interpreter. Paths given to test are relative to the checkout.
END
}

say() { printf './do: %s\n' "$*" >&2; }
have() { command -v "$1" >/dev/null 2>&1; }

# --- Debian packages ------------------------------------------------------------------------------

as_admin() {
    if [ "$uid" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

apt_get() { as_admin env DEBIAN_FRONTEND=noninteractive apt-get -qq -y "$@" >>"$cache/apt.log" 2>&1 9>&-; }

apt_install() { # PACKAGE...: true if all of them are there afterwards
    if ! have apt-get; then
        say "please install what Debian calls: $*"
        return 1
    elif [ "$uid" != 0 ] && ! { have sudo && sudo -n true 2>/dev/null; }; then
        say "for everything: sudo apt-get install --no-install-recommends $*"
        return 1
    fi
    say "installing: $*"
    : >"$cache/apt.log"
    apt_get install --no-install-recommends "$@" && return
    apt_get update || :
    apt_get install --no-install-recommends "$@" && return
    apt_left=''
    for package in "$@"; do # one unknown name must not keep the others away
        apt_get install --no-install-recommends "$package" || apt_left="$apt_left $package"
    done
    [ -z "$apt_left" ] && return
    say "apt-get could not install$apt_left (see $cache/apt.log); going on with what is there"
    return 1
}

lacks() { # LIST: sets missing
    missing=''
    for need in $1; do
        have "${need%%:*}" || missing="$missing ${need#*:}"
    done
    [ -n "$missing" ]
}

alone() { # COMMAND...: while no other ./do does the same
    exec 9>"$cache/lock"
    ! have flock || flock 9
    "$@"
    exec 9>&-
}

packages() { # LIST: installs what lacks; what cannot be installed is said once a day
    lacks "$1" || return 0
    [ ! -e "$cache/told" ] || find "$cache/told" -mtime +0 -delete
    ! grep -qxF -e "$missing" "$cache/told" 2>/dev/null || return 0
    alone install_lacking "$1"
}

install_lacking() { # LIST
    lacks "$1" || return 0 # another ./do has done it meanwhile
    # shellcheck disable=SC2086 # a list of words
    apt_install $missing || printf '%s\n' "$missing" >>"$cache/told"
}

# --- Python ---------------------------------------------------------------------------------------

usable() { # PYTHON: new enough, able to make environments, and within an ordinary user's reach
    probe='import ensurepip, venv, sys; sys.exit(sys.version_info < (3, 11))'
    set -- "$1" -I -c "$probe"
    if [ "$uid" = 0 ] && setpriv --reuid 65534 --clear-groups true 2>/dev/null; then
        set -- setpriv --reuid 65534 --regid 65534 --clear-groups -- "$@"
    fi
    (cd / && "$@") >/dev/null 2>&1
}

pick_python() { # sets python
    for python in ${PYTHON:-/usr/bin/python3 /usr/bin/python3.1? /usr/local/bin/python3 python3}; do
        python=$(command -v "$python") && usable "$python" && return
    done
    return 1
}

make_venv() { # sets venv; leaves a stamp so that the next command need not ask again
    if ! pick_python; then
        [ -z "${PYTHON:-}" ] || { say "$PYTHON is no Python >= 3.11 with venv within reach"; exit 3; }
        apt_install python3 python3-venv || :
        pick_python || { say 'no Python >= 3.11 with venv (packages python3, python3-venv)'; exit 3; }
    fi
    # The file behind the links: an upgrade to another Python then breaks the link, not the imports.
    python=$("$python" -I -c 'import os, sys; print(os.path.realpath(sys._base_executable))')
    venv=$cache/venv-$(printf '%s %s' "$python" "$lock" | cksum | cut -d' ' -f1)
    alone fill_venv
    printf '%s\n' "$venv" >"$stamp.$$"
    mv "$stamp.$$" "$stamp"
}

fill_venv() {
    if [ ! -x "$venv/bin/python" ] || [ ! -e "$venv/complete" ]; then
        say "making the Python environment $venv"
        rm -rf "$venv"
        "$python" -I -m venv "$venv" >&2
        "$venv/bin/python" -I -m pip install -qq --disable-pip-version-check --no-input \
            --require-hashes --only-binary :all: -r "$root/requirements.lock" >&2
        : >"$venv/complete"
    fi
}

ready() { # LIST: the packages and the environment are there
    if [ "$uid" = 0 ]; then
        cache=/var/cache/sandboxd-dev
    else
        HOME=${HOME:-$(getent passwd "$uid" | cut -d: -f6)}
        cache=${XDG_CACHE_HOME:-$HOME/.cache}/sandboxd-dev
    fi
    mask=$(umask)
    umask 022
    [ -d "$cache" ] || mkdir -p "$cache" || { say 'XDG_CACHE_HOME=DIR names another place'; exit 3; }
    if [ -z "${PIP_CERT:-}" ] && [ -r /etc/ssl/certs/ca-certificates.crt ]; then
        export PIP_CERT=/etc/ssl/certs/ca-certificates.crt # knows the company's own authorities
    fi
    packages "$1"
    lock=$(sha256sum <"$root/requirements.lock")
    lock=${lock%% *}
    stamp=$cache/stamp-$lock$(printf '%s' "${PYTHON:-}" | tr / _)
    venv=''
    [ ! -r "$stamp" ] || read -r venv <"$stamp"
    { [ -n "$venv" ] && [ -x "$venv/bin/python" ]; } || make_venv
    umask "$mask"
    py=$venv/bin/python
    unset PYTHONHOME
    export PYTHONPATH="$root" PYTHONPYCACHEPREFIX="$cache/pycache"
}

# --- a place for the tests ------------------------------------------------------------------------
# Outside: a directory, a cgroup and their removal. Inside (`./do inside`, in a mount namespace of
# its own): the mounts, and from root to the test user.
#
# SANDBOXD_TEST_DIR   /run/sandboxd-test.PID, on the disk of /var/tmp (an ordinary user: in $TMPDIR)
#   src               the checkout, read-only; PYTHONPATH and working directory
#   home run cache state tmp    HOME XDG_RUNTIME_DIR XDG_CACHE_HOME XDG_STATE_HOME TMPDIR
#   dev               copies of /dev/fuse and /dev/net/tun for everybody, bound over those
# SANDBOXD_CGROUP     a cgroup v2 subtree that belongs to the test user; its process sits in leaf/
#
# An ordinary user has no src (the checkout itself), dev and subtree, and keeps the environment.

add_subids() { # FILE: a free range in it for the test user
    grep -q "^$TEST_USER:" "$1" 2>/dev/null && return
    cat /etc/subuid /etc/subgid 2>/dev/null | awk -F: -v user="$TEST_USER" '
        BEGIN { start = 100000 }
        $2 + $3 > start { start = $2 + $3 }
        END { printf "%s:%d:65536\n", user, start }' >>"$1"
}

make_test_user() {
    exec 9>"$cache/lock"
    ! have flock || flock 9
    id -u "$TEST_USER" >/dev/null 2>&1 ||
        useradd --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin \
            --comment 'runs the tests of sandboxd' "$TEST_USER"
    add_subids /etc/subuid
    add_subids /etc/subgid
    exec 9>&-
}

make_cgroup() { # sets cgroup; stays empty where there is no cgroup v2 to write to
    top=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/self/mounts)
    if [ -z "$top" ] || ! mkdir "$top/sandboxd-test.$$" 2>/dev/null; then
        say 'no cgroup v2 to write to: the tests that need one will skip'
        return
    fi
    cgroup=$top/sandboxd-test.$$
    mkdir "$cgroup/leaf"
    for controller in cpu cpuset io memory pids; do
        for at in "$top" "$cgroup"; do
            { echo "+$controller" >"$at/cgroup.subtree_control"; } 2>/dev/null || :
        done
    done
    for at in "$cgroup" "$cgroup/leaf"; do
        chown "$TEST_USER:" "$at" "$at/cgroup.procs" "$at/cgroup.threads" "$at/cgroup.subtree_control"
    done
}

drop_cgroup() { # CGROUP: ends what is in it and removes it
    for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
        { echo 1 >"$1/cgroup.kill"; } 2>/dev/null ||
            find "$1" -name cgroup.procs -exec cat {} + 2>/dev/null |
            while read -r pid; do kill -9 "$pid" 2>/dev/null || :; done
        find "$1" -depth -type d -exec rmdir {} + 2>/dev/null || :
        [ -d "$1" ] || return 0
        sleep 0.1
    done
    say "could not remove $1"
}

sweep() { # what a ./do left that was killed with SIGKILL
    for old in /run/sandboxd-test.* /var/tmp/sandboxd-test.* \
        /sys/fs/cgroup/sandboxd-test.* /sys/fs/cgroup/unified/sandboxd-test.*; do
        pid=${old##*.}
        { [ -d "$old" ] && { [ "$pid" = $$ ] || ! kill -0 "$pid" 2>/dev/null; }; } || continue
        case $old in
        /sys/*) drop_cgroup "$old" ;;
        *) rm -rf --one-file-system "$old" ;;
        esac
    done
}

leave_place() {
    trap '' INT TERM HUP
    [ -z "$cgroup" ] || drop_cgroup "$cgroup"
    for at in "$here" "$disk"; do
        [ -z "$at" ] || rm -rf --one-file-system "$at" 2>/dev/null ||
            unshare --map-root-user --map-auto rm -rf --one-file-system "$at" || # files of subuids
            say "could not remove $at"
    done
}

in_place() { # COMMAND...: in the checkout, as an ordinary user; nothing of it stays
    cgroup='' here='' disk='' mode=plain
    trap leave_place EXIT
    if [ "$uid" = 0 ] && setpriv --reuid 65534 --clear-groups true 2>/dev/null; then
        PATH=$PATH:/usr/sbin:/sbin
        umask 022
        make_test_user
        sweep
        here=/run/sandboxd-test.$$ disk=/var/tmp/sandboxd-test.$$
        mkdir "$here" "$disk"
        make_cgroup
        mode=private
        if ! unshare -m --propagation private true 2>/dev/null; then
            say 'no private mount namespace here (CAP_SYS_ADMIN): a copy, as /dev/fuse and tun are'
            mode=copy
        fi
    else
        [ "$uid" != 0 ] || say 'cannot become an ordinary user (CAP_SETUID): going on as root'
        here=$(mktemp -d "${TMPDIR:-/tmp}/sandboxd-test.XXXXXX")
    fi
    set -- sh "$root/do" inside "$mode" "$here" "$disk" "$cgroup" "$@"
    [ "$mode" != private ] || set -- unshare -m --propagation private -- "$@"
    # In the background, so that a trap may run meanwhile; yet with our stdin, and with Ctrl-C, which
    # the command answers itself.
    exec 3<&0
    env --default-signal=INT,QUIT,HUP "$@" <&3 3<&- &
    child=$!
    trap : INT
    trap 'kill "$child" 2>/dev/null || :; wait "$child" || :; exit 143' TERM HUP
    status=0
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do # it was the trap that ended the wait
        status=0
        wait "$child" || status=$?
    done
    return "$status"
}

mounts() { # in the private mount namespace; sets src
    # State wants a file system that can be an overlay's upper directory: a disk's, else a tmpfs.
    if [ "$(stat -f -c %T "$disk")" = overlayfs ]; then
        mount -t tmpfs -o mode=0755 sandboxd-test "$here"
    else
        mount --bind "$disk" "$here"
        mount -o remount,bind,exec,suid "$here"
    fi
    mkdir "$here/src" "$here/dev"
    if unreadable; then
        copy_checkout
    else
        mount --bind "$root" "$here/src"
        mount -o remount,bind,ro "$here/src"
    fi
    mount -t tmpfs -o mode=0755 sandboxd-test "$here/dev"
    for node in /dev/fuse:229 /dev/net/tun:200; do
        at=${node%:*} copy=$here/dev/$(basename "${node%:*}")
        { mknod -m 0666 "$copy" c 10 "${node#*:}" && mount --bind "$copy" "$at"; } 2>/dev/null ||
            say "no $at for the tests"
    done
}

unreadable() { # is there a file in the checkout that others may not read?
    [ -n "$(find "$root" -name .git -prune -o ! -type l ! -perm -o=r -print -quit)" ]
}

copy_checkout() {
    (cd "$root" && tar -c --exclude=./.git .) | tar -x --no-same-owner -C "$here/src"
    chmod -R a+rX "$here/src"
}

inside() { # MODE HERE DISK CGROUP COMMAND...: becomes the command
    mode=$1 here=$2 disk=$3 cgroup=$4 src=$root
    shift 4
    case $mode in
    private) mounts ;;
    copy) mkdir "$here/src" && copy_checkout ;;
    esac
    [ "$mode" = plain ] || src=$here/src
    mkdir -m 0700 "$here/home" "$here/run" "$here/cache" "$here/state" "$here/tmp"
    [ -z "$cgroup" ] || echo $$ >"$cgroup/leaf/cgroup.procs"
    set -- "SANDBOXD_TEST_DIR=$here" "TMPDIR=$here/tmp" "XDG_RUNTIME_DIR=$here/run" \
        "XDG_CACHE_HOME=$here/cache" "XDG_STATE_HOME=$here/state" "PYTHONPATH=$src" \
        "PYTHONPYCACHEPREFIX=$here/cache/pycache" \
        "HYPOTHESIS_STORAGE_DIRECTORY=$here/cache/hypothesis" "$@"
    [ -z "$cgroup" ] || set -- "SANDBOXD_CGROUP=$cgroup" "$@"
    cd "$src"
    if [ "$mode" = plain ]; then
        exec env -u SANDBOXD_HOST -u SANDBOXD_CONFIG -u SANDBOXD_POLICY_PATH -u SANDBOXD_LOG "$@"
    fi
    chown "$TEST_USER:" "$here/home" "$here/run" "$here/cache" "$here/state" "$here/tmp"
    [ -z "${TERM:-}" ] || set -- "TERM=$TERM" "$@"
    [ -z "${CI:-}" ] || set -- "CI=$CI" "$@"
    [ -z "${SANDBOXD_TEST_KILLS:-}" ] || set -- "SANDBOXD_TEST_KILLS=$SANDBOXD_TEST_KILLS" "$@"
    [ -z "${SANDBOXD_TEST_SEED:-}" ] || set -- "SANDBOXD_TEST_SEED=$SANDBOXD_TEST_SEED" "$@"
    [ -z "${SANDBOXD_TEST_STRESS:-}" ] || set -- "SANDBOXD_TEST_STRESS=$SANDBOXD_TEST_STRESS" "$@"
    exec setpriv --reuid "$TEST_USER" --regid "$TEST_USER" --init-groups -- env -i \
        PATH=/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin LANG=C.UTF-8 \
        USER="$TEST_USER" LOGNAME="$TEST_USER" HOME="$here/home" SHELL=/bin/sh "$@"
}

# --- the commands ---------------------------------------------------------------------------------

run() {
    ready "$RUN_NEEDS"
    if [ $# = 0 ]; then
        cd "$root"
        # shellcheck disable=SC2086 # a list of words
        set -- $EXAMPLE
    else
        set -- run "$@"
    fi
    exec "$py" -P -m sandboxd "$@"
}

tests() {
    ready "$RUN_NEEDS $TEST_NEEDS"
    in_place "$py" -P -m pytest -p no:cacheprovider "$@"
}

vm() {
    PATH=$PATH:/usr/sbin:/sbin # mke2fs
    ready "$VM_NEEDS"
    exec "$py" -P -m tests.vm --cache "$cache" "$@"
}

fuzz() {
    ready "$RUN_NEEDS $TEST_NEEDS"
    if [ $# != 0 ]; then
        file=fuzz/${1%.py}.py
        shift
        in_place "$py" -P "$file" "$@"
        return
    fi
    for file in "$root"/fuzz/*.py; do
        [ -e "$file" ] || { say 'nothing in fuzz/ yet'; return; }
        say "${file##*/}"
        (in_place "$py" -P "fuzz/${file##*/}")
    done
}

step() { # NAME COMMAND...: one part of a check; the others still run when it fails
    name=$1
    shift
    "$@" || failed="$failed $name"
}

check() {
    ready "$RUN_NEEDS"
    cd "$root"
    # mypy takes another checkout's module of the same name for this one's.
    here=$(printf '%s' "$root" | cksum | cut -d' ' -f1)
    export RUFF_CACHE_DIR="$cache/ruff" MYPY_CACHE_DIR="$cache/mypy-$here"
    failed=''
    step format "$py" -m ruff format --check --quiet .
    step lint "$py" -m ruff check --quiet --output-format concise .
    set --
    for room in sandboxd tests fuzz; do
        [ -z "$(find "$room" -name '*.py' -print -quit 2>/dev/null)" ] || set -- "$@" "$room"
    done
    step types "$py" -m mypy --no-error-summary "$@"
    if [ -d sandboxd/cli ] && ls policies/*.toml >/dev/null 2>&1; then
        step policies "$py" -m sandboxd policy check policies/*.toml
    fi
    ! have shellcheck || step shell shellcheck 'do' .ci/run
    [ -z "$failed" ] || { say "check failed:$failed"; return 1; }
    say 'check: all well'
}

fmt() {
    ready ''
    cd "$root"
    export RUFF_CACHE_DIR="$cache/ruff"
    "$py" -m ruff check --quiet --select I --fix . || :
    "$py" -m ruff format .
}

lock() {
    ready ''
    cd "$root"
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    "$py" -m venv "$scratch/uv"
    "$scratch/uv/bin/pip" install --quiet uv >&2
    "$scratch/uv/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes \
        --only-binary :all: --no-emit-index-url --no-header --no-config \
        --extra test --group check pyproject.toml -o requirements.lock
}

root=$0
[ ! -h "$root" ] || root=$(readlink -f "$root")
case $root in */*) root=${root%/*} ;; *) root=. ;; esac
root=$(CDPATH='' cd -- "$root" && pwd -P)
uid=$(id -u)

verb=${1:-help}
[ $# = 0 ] || shift
case $verb in
run) run "$@" ;;
sandboxd)
    ready "$RUN_NEEDS"
    exec "$py" -P -m sandboxd "$@"
    ;;
test) tests "$@" ;;
check) check ;;
fmt) fmt ;;
bench)
    ready "$RUN_NEEDS $TEST_NEEDS"
    in_place "$py" -P -m tests.bench "$@"
    ;;
fuzz) fuzz "$@" ;;
vm) vm "$@" ;;
python)
    ready ''
    exec "$py" -P "$@"
    ;;
lock) lock ;;
inside) inside "$@" ;;
help | -h | --help) usage ;;
*)
    say "no such command: $verb"
    usage >&2
    exit 2
    ;;
esac
