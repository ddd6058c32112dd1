#!/usr/bin/env bash
# The single door:
#   ./run.sh                     serve, on http://127.0.0.1:3100 unless the settings say otherwise
#   ./run.sh test [pytest args]  run the tests, on a real Docker engine; -m "not engine" are those that need none
#   ./run.sh bench [NAME...]     measure all, or sections of it, against what it stands on
#   ./run.sh lint                look over the code
# Settings are environment variables; README.md lists them.
set -euo pipefail
cd "$(dirname "$0")"

say() { echo "run.sh: $*" >&2; }

is_debian_root() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

apt_updated=
install_packages() {
    if [ -z "$apt_updated" ]; then
        apt-get update -qq >/dev/null
        apt_updated=yes
    fi
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# need PROGRAM=PACKAGE...: install the packages of the programs that are missing.
need() {
    local pair missing=()
    for pair in "$@"; do
        PATH="$PATH:/usr/sbin:/sbin" command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
    done
    [ ${#missing[@]} = 0 ] && return
    if is_debian_root; then
        say "installing ${missing[*]}"
        install_packages "${missing[@]}"
    else
        say "missing here: ${missing[*]}. As root: apt-get install ${missing[*]}"
        return 1
    fi
}

# They carry the scripts of /openapi and of the terminal; what they would bring along is not needed for that.
SCALAR='flask-openapi3-scalar>=1.44.15'
XTERM='nicegui>=3.18.0'

make_venv() {
    local wanted
    wanted=$(python3 --version; pwd; echo "$SCALAR $XTERM"; sha256sum setup.cfg pyproject.toml)
    [ "$(cat .venv/stamp 2>/dev/null)" = "$wanted" ] && return
    say "making .venv"
    rm -rf .venv
    if ! python3 -m venv .venv 2>/dev/null; then
        is_debian_root || { say "python3 lacks venv. As root: apt-get install python3-venv"; exit 1; }
        install_packages python3-venv
        python3 -m venv .venv
    fi
    .venv/bin/pip install -qq --disable-pip-version-check --config-settings editable_mode=compat -e '.[test]'
    .venv/bin/pip install -qq --disable-pip-version-check --no-deps "$SCALAR" "$XTERM"
    echo "$wanted" >.venv/stamp
}

# A taken port is told before anything is made. What else may be wrong with HOST and PORT the server says.
see_to_port() {
    local host=${HOST:-127.0.0.1} port=${PORT:-3100}
    python3 - "$host" "$port" <<'PY' && return
import errno, socket, sys
try:
    family, *_, address = socket.getaddrinfo(*sys.argv[1:], type=socket.SOCK_STREAM)[0]
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
except OSError as error:
    sys.exit(error.errno == errno.EADDRINUSE)
PY
    say "PORT=$port: another program listens there on HOST=$host. Stop it, or start with another PORT"
    exit 2
}

# Say what would change it if the engine is there, but not for this user; else return 1.
is_refused() {
    local socket=${DOCKER_HOST:-/var/run/docker.sock} group user
    socket=${socket#unix://}
    { [ -S "$socket" ] && ! [ -w "$socket" ]; } || return
    group=$(stat -c %G "$socket")
    user=$(id -un 2>/dev/null || id -u)
    if [ "$group" = root ]; then
        say "Docker is there, but only root may use $socket, and this is $user"
    else
        say "Docker is there, but $user is not in the group $group, whose members may use $socket. As root:"
        say "    usermod -aG $group $user    # then log in again"
    fi
}

engine_answers() {
    .venv/bin/python - 2>/dev/null <<'PY'
import os, docker
host = os.environ.get('DOCKER_HOST', '')
if host.startswith('/'):
    os.environ['DOCKER_HOST'] = 'unix://' + host
docker.from_env(timeout=5).ping()
PY
}

has_base_image() {
    .venv/bin/python - "${BASE_IMAGE:-debian:bookworm-slim}" agentbackend-debian:bookworm 2>/dev/null <<'PY'
import os, sys, docker
host = os.environ.get('DOCKER_HOST', '')
if host.startswith('/'):
    os.environ['DOCKER_HOST'] = 'unix://' + host
tags = {tag for image in docker.from_env(timeout=5).images.list() for tag in image.tags}
sys.exit(not tags & set(sys.argv[1:]))
PY
}

start_engine() {
    if [ -d /run/systemd/system ]; then
        systemctl start docker
    elif ! pgrep -x dockerd >/dev/null; then
        # A daemon that died leaves its number behind, and the next one takes that for a running one.
        rm -f /var/run/docker.pid /var/run/docker/containerd/containerd.pid
        PATH="$PATH:/usr/sbin:/sbin" setsid dockerd >/var/log/dockerd.log 2>&1 </dev/null &
    fi
    for _ in $(seq 120); do
        engine_answers && return
        sleep 0.5
    done
    say "the Docker engine did not start; see /var/log/dockerd.log or journalctl -u docker"
    return 1
}

see_to_engine() {
    engine_answers && return
    is_refused && return 1
    if [ -n "${DOCKER_HOST:-}" ]; then
        say "no Docker engine answers at DOCKER_HOST=$DOCKER_HOST; start it there"
        return 1
    fi
    if ! is_debian_root; then
        say "no Docker engine answers. As root, on Debian or Ubuntu:"
        say "    apt-get update && apt-get install -y docker.io debootstrap && systemctl start docker"
        say "    usermod -aG docker $(id -un)    # then log in again"
        return 1
    fi
    # The engine comes last: as soon as it answers, the server begins to build with what else is there.
    need debootstrap=debootstrap iptables=iptables pgrep=procps dockerd=docker.io
    say "starting the Docker engine"
    start_engine && say "the Docker engine answers"
}

# The server takes the base image from the engine, else pulls it. Where no registry is reached, one is made here.
see_to_base_image() {
    if has_base_image || timeout 30 docker pull -q "${BASE_IMAGE:-debian:bookworm-slim}" >/dev/null 2>&1; then
        return
    fi
    is_debian_root || { say "no registry is reached; as root: templates/make-debian-image makes a Debian image"; return 1; }
    need debootstrap=debootstrap
    templates/make-debian-image
}

serve() {
    need python3=python3
    see_to_port
    make_venv
    # What is missing comes while the server is there already; it waits for the image.
    case "${DOCKER_HOST:-}" in
        swarm://* | ssh://* | *,*)
            say "the server sees which of the engines of DOCKER_HOST answer" ;;
        *)
            if engine_answers; then
                say "the Docker engine answers"
            else
                say "no Docker engine answers yet; the server starts, and sees it when it is there"
            fi
            { see_to_engine && see_to_base_image; } & ;;
    esac
    BASE_IMAGE_TIMEOUT=${BASE_IMAGE_TIMEOUT:-600} exec .venv/bin/agentbackend
}

run_tests() {
    make_venv
    # Those that need no engine are chosen with -m "not engine", and run on a machine that has none.
    case " $* " in
        *' not engine '*) ;;
        *) see_to_engine; see_to_base_image ;;
    esac
    need chromium=chromium node=nodejs npm=npm busybox=busybox-static ssh=openssh-client ssh-keygen=openssh-client git=git curl=curl \
        nginx=nginx-light caddy=caddy faketime=faketime rsync=rsync
    # The package starts a registry of its own, which nobody wants here.
    if ! command -v docker-registry >/dev/null; then
        need docker-registry=docker-registry
        systemctl disable --now docker-registry >/dev/null 2>&1 || true
    fi
    # Else each of the many Pythons that the tests start would compile the code anew.
    unset PYTHONDONTWRITEBYTECODE
    case "$*" in
        '' | '-m not engine') ;;
        *) exec .venv/bin/python -m pytest "$@" ;;
    esac
    # Most tests wait most of the time, so there is a run more than cores, or as many as RUNS says; they share the
    # files.
    local share run runs=() status=0
    share=$(mktemp -d)
    for run in $(seq $((${RUNS:-$(nproc) + 1} - 1))); do
        .venv/bin/python -m pytest --share="$share" "$@" >"$share/output$run" 2>&1 &
        runs+=($!)
    done
    .venv/bin/python -m pytest --share="$share" "$@" || status=$?
    for run in "${runs[@]}"; do
        wait "$run" || status=$?
    done
    cat "$share"/output*
    rm -r "$share"
    return "$status"
}

run_benches() {
    make_venv
    see_to_engine
    see_to_base_image
    need busybox=busybox-static
    .venv/bin/python -c 'import matplotlib' 2>/dev/null || .venv/bin/pip install -qq --disable-pip-version-check -e '.[bench]'
    .venv/bin/python -m bench "$@"
}

lint() {
    make_venv
    need shellcheck=shellcheck
    .venv/bin/ruff check .
    local scripts
    mapfile -t scripts < <(git ls-files --cached --others --exclude-standard | xargs awk 'FNR == 1 && /^#!.*(\/| )(ba|da)?sh$/ { print FILENAME }')
    shellcheck "${scripts[@]}"
    say "nothing to complain about"
}

case "${1:-serve}" in
    serve) serve ;;
    test) shift; run_tests "$@" ;;
    bench) shift; run_benches "$@" ;;
    lint) lint ;;
    help | -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" ;;
    *) say "unknown: $1; it takes nothing (serve), test, bench, lint or --help"; exit 2 ;;
esac
