#!/bin/bash
# Turns the namespaces that it is started in into a host of the rehearsal cluster. cluster.sh starts it, as
#
#   unshare --net --mount --uts --ipc --pid --fork bash host.sh NAME
#
# It is the first process there (PID 1): when it dies, the kernel ends every other one of that host, and with the last
# of them go the host's mounts and its network. So a host leaves nothing behind, however it ends.

set -euo pipefail

NAME=$1
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CACHE=${CLUSTER_CACHE:?}
STATE=${CLUSTER_STATE:?}
ROOT=$STATE/$NAME/root

# /proc still shows the machine's view here: these are the numbers by which the machine knows this process.
tell_pid() {
    local stat
    stat=$(</proc/self/stat) # a builtin's redirection: "self" is this shell, not a child
    local -a field
    read -r -a field <<<"${stat##*) }"
    echo "${stat%% *} ${field[19]}" >"$STATE/$NAME/pid.new"
    mv "$STATE/$NAME/pid.new" "$STATE/$NAME/pid"
}

mount_root() {
    mount --make-rprivate /
    mkdir -p "$STATE/$NAME"/{upper,work,root}
    mount -t overlay overlay -o "lowerdir=$CACHE/nodes,upperdir=$STATE/$NAME/upper,workdir=$STATE/$NAME/work" "$ROOT"
    mount -t proc proc "$ROOT/proc"
    mount -t sysfs sysfs "$ROOT/sys"
    mount -t tmpfs -o mode=755 tmpfs "$ROOT/run"
    mkdir -p "$ROOT"/run/{slurm,munge} "$ROOT"/srv/{work,tmpdir,users} "$ROOT"/{work,tmpdir,users}
}

# A /dev of its own: the modes of the machine's devices are not this script's to change.
mount_dev() {
    local dev=$ROOT/dev
    mount -t tmpfs -o mode=755 tmpfs "$dev"
    mkdir "$dev"/{shm,pts,mqueue}
    mount -t tmpfs -o mode=1777 tmpfs "$dev/shm"
    mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$dev/pts"
    mount -t mqueue mqueue "$dev/mqueue"
    ln -s pts/ptmx "$dev/ptmx"
    ln -s /proc/self/fd "$dev/fd"
    ln -s fd/0 "$dev/stdin"
    ln -s fd/1 "$dev/stdout"
    ln -s fd/2 "$dev/stderr"
    local name major minor
    while read -r name major minor; do
        mknod -m 666 "$dev/$name" c "$major" "$minor"
    done < <(printf '%s\n' 'null 1 3' 'zero 1 5' 'full 1 7' 'random 1 8' 'urandom 1 9' 'tty 5 0' 'fuse 10 229' \
        'rehearsal-gpu0 1 3' 'rehearsal-gpu1 1 3' 'rehearsal-gpu2 1 3' 'rehearsal-gpu3 1 3')
}

# The folders that all hosts share lie under /srv; what users see is bound over that, so that `cluster.sh broken-locks`
# can put another file system in between.
mount_shared() {
    local folder
    for folder in work tmpdir users; do
        mount --bind "$STATE/shared/$folder" "$ROOT/srv/$folder"
        mount --bind "$ROOT/srv/$folder" "$ROOT/$folder"
        [[ ! -e $STATE/broken-locks ]] ||
            chroot "$ROOT" bindfs -o allow_other,nonempty,attr_timeout=0,entry_timeout=0 "/srv/$folder" "/$folder"
    done
}

configure() {
    hostname "$NAME"
    echo "$NAME" >"$ROOT/etc/hostname"
    mkdir -p "$ROOT"/etc/slurm "$ROOT"/var/log/slurm "$ROOT"/var/spool/{slurmctld,slurmd}
    cp "$HERE"/etc/{slurm,gres,cgroup}.conf "$HERE/etc/task_prolog.sh" "$ROOT/etc/slurm/"
    cp "$HERE/etc/hosts" "$ROOT/etc/hosts"
    grep -q ^collegue: "$ROOT/etc/passwd" || # since an earlier start
        echo collegue:x:1001:1000::/users/groupe/collegue:/bin/bash >>"$ROOT/etc/passwd"
    cp "$HERE/mount_shared.sh" "$ROOT/usr/local/sbin/mount-shared"
    cp "$STATE/file-system" "$ROOT/run/file-system" 2>/dev/null || echo bind >"$ROOT/run/file-system"
    chown munge:munge "$ROOT/run/munge" "$ROOT"/etc/munge/munge.key 2>/dev/null ||
        chroot "$ROOT" chown munge:munge /run/munge
}

join_network() { # cluster.sh plugs the cable in
    local try address
    for ((try = 0; try < 100; try++)); do
        ip link show eth0 &>/dev/null && break
        sleep 0.1
    done
    address=$(awk -v name="$NAME" '$2 == name { print $1 }' "$HERE/etc/hosts")
    ip link set lo up
    ip address add "$address/24" dev eth0
    ip link set eth0 up
}

start_daemons() {
    if [[ $NAME == storage ]]; then # cluster.sh starts its server, and waits for its answer
        touch /run/ready
        return
    fi
    bash /usr/local/sbin/mount-shared "$(</run/file-system)"
    runuser -u munge -- /usr/sbin/munged
    if [[ $NAME == controller ]]; then
        slurmctld
    else
        slurmd -N "$NAME"
    fi
}

run_switch() { # the cable that joins the hosts: a bridge
    ip link set lo up
    ip link add br0 type bridge
    ip link set br0 up
    tell_pid
    exec sleep infinity
}

[[ $NAME != switch ]] || run_switch
tell_pid
mount_root
mount_dev
mount_shared
configure
join_network
mkdir -p "$ROOT/mnt/old"
cd "$ROOT"
pivot_root . mnt/old
cd /
umount -l /mnt/old
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
start_daemons </dev/null
exec tini -- sleep infinity
