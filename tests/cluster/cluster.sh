#!/bin/bash
# A small Slurm cluster on this machine, to rehearse what a researcher does on Turpan. As root:
#
#   bash cluster.sh up                       builds (once, about 3 minutes) and starts it; prints each phase's seconds
#   bash cluster.sh exec login -- sinfo      runs a command on a host as the ordinary user, in his HOME
#   bash cluster.sh exec n1 --user root --cd /work -- ls -l
#   bash cluster.sh exec login --online -- apptainer exec --bind /tmpdir,/work IMAGE pip install optuna
#   bash cluster.sh crash n2                 n2 dies at once: no process, no network
#   bash cluster.sh restart n2               … and comes back
#   bash cluster.sh broken-locks on|off      POSIX locks hold on one host only, as on Lustre mounted with localflock
#   bash cluster.sh file-system bind|gluster|gluster-stale
#                                            what lies under /work/groupe and /tmpdir: the machine's folder, or a
#                                            GlusterFS volume that each host mounts, without caches or with stale ones
#   bash cluster.sh disk full|free           of the GlusterFS server
#   bash cluster.sh server stop|start        its processes
#   bash cluster.sh link n2 20 [1]           n2's cable: 20 ms late each way [1 % is lost]; or cut, or whole
#   bash cluster.sh down                     ends it; the cache stays, and nothing else
#
# The hosts are `login` (also called controller: slurmctld), n1 … n6 (two GPUs each, on paper) and m1 (MIG). Each has
# namespaces of its own (host.sh), and they share /work, /tmpdir and /users. Compute nodes reach no network but each
# other; `--online` gives a command on the login node the machine's network and pip's settings. n7 … n15 never wake up,
# but Slurm plans on them (sbatch --test-only).
#
# Exit status 3: this machine cannot play a cluster (not root, no overlay or fuse or namespaces); 1: any other failure.
# CLUSTER_CACHE (default /var/cache/optuna-turpan-cluster) keeps what was built: 1 GB.
# CLUSTER_STATE (default /var/lib/optuna-turpan-cluster) is the running cluster: `down` removes it.

set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export CLUSTER_CACHE=${CLUSTER_CACHE:-/var/cache/optuna-turpan-cluster}
export CLUSTER_STATE=${CLUSTER_STATE:-/var/lib/optuna-turpan-cluster}
HOSTS=(controller n{1..6} m1)
ORDINARY_USER=chercheur
COLLEAGUE=collegue                                                     # of the same group; host.sh makes this user
IMAGE=conteneurs/sessions-interactives/pytorch-24.02-py3-calmip-si.sif # below /work

# shellcheck source=tests/cluster/storage.sh
source "$HERE/storage.sh"

die() {
    echo "cluster.sh: $*" >&2
    exit 1
}

cannot() { # no fault of the cluster: this machine is of another kind
    echo "cluster.sh: cannot run here: $*" >&2
    exit 3
}

phase() { # phase WHAT COMMAND…: runs it and prints how long it took
    local what=$1 start=$SECONDS
    shift
    "$@"
    printf '%-50s %4d s\n' "$what" $((SECONDS - start))
}

# ---------- can it run here? ----------

check_machine() {
    ((EUID == 0)) || cannot "needs root: it makes hosts out of namespaces."
    [[ -n $(apt-get indextargets 2>/dev/null) ]] || cannot "needs a Debian machine: its packages come through apt-get."
    local type
    for type in overlay fuse; do
        grep -qw "$type" /proc/filesystems || cannot "this kernel has no $type file system, and the hosts need one."
    done
    [[ $(</proc/sys/user/max_user_namespaces) -gt 0 ]] ||
        cannot "user namespaces are switched off (user.max_user_namespaces), and apptainer without setuid needs them."
    unshare --net --mount --uts --ipc --pid --fork true 2>/dev/null ||
        cannot "this machine lets root make no namespaces (a container?), and the hosts are made of them."
}

check_network() { # needs ip, so after the packages
    unshare --net bash -c 'ip link add type bridge && ip link add type veth' 2>/dev/null ||
        cannot "this kernel has no bridge or no veth devices, and the hosts' network needs them."
}

install_packages() {
    local missing=()
    [[ -x /usr/sbin/debootstrap ]] || missing+=(debootstrap)
    [[ -x $(type -P ip) ]] || missing+=(iproute2)
    ((${#missing[@]})) || return 0
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends "${missing[@]}" >/dev/null
}

# ---------- build ----------

isolated_build() { # a killed build leaves neither mounts nor processes
    unshare --mount --pid --fork --kill-child --mount-proc bash "$HERE/build.sh" "$1"
}

# What build.sh makes depends on build.sh alone: a change there makes the cache stale.
build() {
    local recipe
    recipe=$(sha256sum <"$HERE/build.sh")
    mkdir -p "$CLUSTER_CACHE"
    exec {lock}>"$CLUSTER_CACHE/lock"
    flock "$lock"
    if [[ $(cat "$CLUSTER_CACHE/recipe" 2>/dev/null) != "$recipe" ]]; then
        any_alive && die "the cache is stale and the cluster runs on it: say 'cluster.sh down' first."
        rm -rf "$CLUSTER_CACHE"/{nodes,image-root,image.sif}{,.partial} "$CLUSTER_CACHE/recipe"
        phase "  package lists" apt-get -qq update
        phase "  root file system of the nodes" isolated_build nodes
        phase "  root file system of the image" isolated_build image
        phase "  image (sif)" isolated_build sif
        echo "$recipe" >"$CLUSTER_CACHE/recipe"
    fi
    exec {lock}>&-
}

# ---------- hosts, known by pid and start time (a pid alone may come back as another process) ----------

pid_of() { # pid_of HOST: its first process, or failure if it is not alive
    local pid started
    read -r pid started 2>/dev/null <"$CLUSTER_STATE/$1/pid" || return 1
    [[ $(start_time "$pid") == "$started" ]] || return 1
    echo "$pid"
}

start_time() {
    local stat
    local -a field
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
    read -r -a field <<<"${stat##*) }"
    [[ ${field[0]} == Z ]] || echo "${field[19]}"
}

any_alive() {
    local host
    for host in switch storage "${HOSTS[@]}"; do
        ! pid_of "$host" >/dev/null || return 0
    done
    return 1
}

in_host() { # in_host HOST COMMAND…, as root
    local pid
    pid=$(pid_of "$1") || die "$1 is not running."
    shift
    nsenter --target "$pid" --net --mount --uts --ipc --pid -- "$@"
}

wait_for_pid() { # wait_for_pid HOST, just started
    local try
    for ((try = 0; try < 100; try++)); do
        pid_of "$1" && return 0
        sleep 0.1
    done
    die "$1 did not start: $(tail -n 3 "$CLUSTER_STATE/$1/console.log")"
}

is_plugged() { pid_of "$1" >/dev/null && in_host "$1" ip link show eth0 &>/dev/null; }

# The switch is a network namespace with a bridge, and a process that keeps it: the machine's own network is untouched.
start_switch() {
    mkdir -p "$CLUSTER_STATE/switch"
    setsid unshare --net bash "$HERE/host.sh" switch </dev/null &>"$CLUSTER_STATE/switch/console.log" &
    wait_for_pid switch >/dev/null
}

start_host() { # start_host HOST, unless it runs
    local name=$1 pid switch
    is_plugged "$name" && return 0
    stop_host "$name"
    mkdir -p "$CLUSTER_STATE/$name"
    rm -f "$CLUSTER_STATE/$name/pid"
    setsid unshare --net --mount --uts --ipc --pid --fork bash "$HERE/host.sh" "$name" \
        </dev/null &>>"$CLUSTER_STATE/$name/console.log" &
    pid=$(wait_for_pid "$name")
    switch=$(pid_of switch) || die "the cluster is not up."
    # One command: an `up` that is killed here leaves a cable that is plugged in at both ends, or none.
    nsenter --target "$switch" --net bash -c "
        ip link delete to-$name 2>/dev/null
        ip link add to-$name up master br0 type veth peer name eth0 netns $pid"
}

stop_host() { # SIGKILL to its first process: the kernel ends all others of its PID namespace with it
    local pid
    pid=$(pid_of "$1") || return 0
    kill -KILL "$pid"
    while pid_of "$1" >/dev/null; do sleep 0.05; done
}

make_shared() {
    local shared=$CLUSTER_STATE/shared
    mkdir -p "$shared"/{work,tmpdir,users}
    [[ -e $shared/work/$IMAGE ]] || {
        mkdir -p "$(dirname "$shared/work/$IMAGE")"
        ln "$CLUSTER_CACHE/image.sif" "$shared/work/$IMAGE" 2>/dev/null ||
            cp "$CLUSTER_CACHE/image.sif" "$shared/work/$IMAGE"
    }
    local folder
    for folder in {work/groupe,tmpdir,users/groupe}/"$ORDINARY_USER"; do
        mkdir -p "$shared/$folder"
        chown 1000:1000 "$shared/$folder"
    done
    mkdir -p "$shared/users/groupe/$COLLEAGUE"
    chown 1001:1000 "$shared/users/groupe/$COLLEAGUE"
}

start_all() {
    local host
    pid_of switch >/dev/null || down
    make_shared
    pid_of switch >/dev/null || start_switch
    for host in "${HOSTS[@]}"; do start_host "$host"; done
    for host in "${HOSTS[@]:1}"; do wait_idle "$host"; done
}

wait_idle() { # wait_idle HOST: Slurm will give it work
    local try state=''
    for ((try = 0; try < 150; try++)); do
        state=$(in_host controller sinfo --noheader --format=%T --nodes="$1" 2>/dev/null | head -n 1) || true
        # Of a node that died and came back within seconds Slurm knows only the good news: ask the node, too.
        [[ $state =~ ^(idle|mixed|allocated)$ ]] && in_host "$1" scontrol show slurmd &>/dev/null && return 0
        sleep 0.2
    done
    die "$1 is '$state' after 30 s; see $CLUSTER_STATE/$1/upper/var/log/slurm/slurmd.log"
}

# ---------- commands ----------

up() {
    local start=$SECONDS
    check_machine
    phase "packages" install_packages
    check_network
    phase "build" build
    phase "start" start_all
    printf '%-50s %4d s\n' "up: ${HOSTS[*]}" $((SECONDS - start))
}

down() {
    local host
    for host in "${HOSTS[@]}" storage; do
        stop_host "link-$host"
        stop_host "$host"
    done
    stop_host switch
    rm -rf "$CLUSTER_STATE"
}

crash() {
    [[ " ${HOSTS[*]} " == *" ${1:-} "* ]] || die "crash which of: ${HOSTS[*]}?"
    stop_host "$1"
}

restart() {
    crash "$@"
    start_host "$1"
    [[ $1 == controller ]] || wait_idle "$1"
}

# bindfs passes no locks on: each host's kernel then keeps them for itself. A host that starts later reads the flag.
broken_locks() {
    local host folder how=${1:-} flag=$CLUSTER_STATE/broken-locks was=off
    [[ $how == on || $how == off ]] || die "broken-locks on or off?"
    [[ ! -e $flag ]] || was=on
    [[ $how != "$was" ]] || return 0
    [[ $(file_system_now) == bind ]] || die "the file system is $(file_system_now)."
    if [[ $how == on ]]; then touch "$flag"; else rm "$flag"; fi
    for host in "${HOSTS[@]}"; do
        is_plugged "$host" || continue
        for folder in work tmpdir users; do
            if [[ $how == on ]]; then
                in_host "$host" bindfs -o allow_other,nonempty,attr_timeout=0,entry_timeout=0 "/srv/$folder" "/$folder"
            else
                in_host "$host" umount -l "/$folder" # a process may be in it
            fi
        done
    done
}

# pip's settings on this machine, as variables: pip in a container sees neither its files nor its certificates.
pip_environment() {
    env | grep -E '^PIP_(INDEX_URL|PROXY|TRUSTED_HOST|CERT|DEFAULT_TIMEOUT)=' || true
    python3 -m pip config list 2>/dev/null |
        sed -nE "s/^global\.(index-url|proxy|trusted-host|cert)='(.*)'$/\1=\2/p" |
        while IFS='=' read -r key value; do
            key=${key//-/_}
            echo "PIP_${key^^}=$value"
        done
}

give_file() { # give_file HOST FILE: the machine's own, at the same place
    # shellcheck disable=SC2016,SC2094 # expanded by the shell inside; and there it is another file
    in_host "$1" bash -c 'mkdir -p "$(dirname "$0")" && cat >"$0"' "$2" <"$2"
}

online_environment() {
    local line
    while read -r line; do
        echo "$line"
        [[ $line == PIP_CERT=* && -f ${line#*=} ]] || continue
        give_file controller "${line#*=}"
        echo "APPTAINER_BIND=${line#*=}"
    done < <(pip_environment)
    env | grep -iE '^(https?|no)_proxy=' || true
}

run_on() { # run_on HOST [--user USER] [--cd FOLDER] [--online] -- COMMAND…
    local host=${1:-} user=$ORDINARY_USER folder='' pid variables=() spaces=(--net --mount --uts --ipc --pid)
    [[ $host == login ]] && host=controller
    pid=$(pid_of "$host") || die "host '$host' is not running."
    shift
    while [[ ${1:-} == --?* ]]; do
        case $1 in
            --user) user=$2 && shift ;;
            --cd) folder=$2 && shift ;;
            --online)
                mapfile -t variables < <(online_environment)
                give_file "$host" /etc/resolv.conf
                spaces=("${spaces[@]:1}")
                ;;
            *) die "exec: unknown option $1" ;;
        esac
        shift
    done
    [[ ${1:-} == -- && $# -ge 2 ]] || die "usage: cluster.sh exec HOST [--user USER] [--cd FOLDER] [--online] -- COMMAND…"
    shift
    # shellcheck disable=SC2016 # expanded by the shell inside
    exec nsenter --target "$pid" "${spaces[@]}" -- \
        setpriv --reuid "$user" --regid "$(in_host "$host" id -g "$user")" --init-groups --reset-env \
        env LANG=C.UTF-8 "${variables[@]}" \
        bash -c 'cd "${1:-$HOME}" && shift && exec "$@"' exec "$folder" "$@"
}

case ${1:-} in
    up | down | crash | restart) "$@" ;;
    broken-locks) broken_locks "${@:2}" ;;
    file-system) file_system "${@:2}" ;;
    disk | server | link) "$@" ;;
    exec) run_on "${@:2}" ;;
    *) die "usage: cluster.sh up|down|exec|crash|restart|broken-locks|… (see the head of this file)" ;;
esac
