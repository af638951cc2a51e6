# shellcheck shell=bash disable=SC2153,SC2154 # $CLUSTER_STATE, $HOSTS, in_host, …: cluster.sh, which sources this file
# The host `storage` of the rehearsal cluster: a GlusterFS server, which the others mount (mount_shared.sh).
#
# Its bricks lie in a file system of their own in its memory, so that it can be full, and the server's processes can
# end without it.

BRICK_SIZE=4g # the preflight asks for 2 GiB

file_system_now() { cat "$CLUSTER_STATE/file-system" 2>/dev/null || echo bind; }

# file_system bind|gluster|gluster-stale: what /work/groupe and /tmpdir are. No job may run.
file_system() {
    local host how=${1:-} hosts=()
    [[ $how =~ ^(bind|gluster|gluster-stale)$ ]] || die "file-system bind, gluster or gluster-stale?"
    [[ $how != "$(file_system_now)" ]] || return 0
    [[ ! -e $CLUSTER_STATE/broken-locks ]] || die "broken-locks are on."
    if [[ $how != bind ]]; then
        start_storage
        make_volume "$how"
    fi
    echo "$how" >"$CLUSTER_STATE/file-system" # a host that starts from now on reads it
    for host in "${HOSTS[@]}"; do
        is_plugged "$host" || continue
        in_host "$host" bash -s -- "$how" <"$HERE/mount_shared.sh" &
        hosts+=($!)
    done
    for host in "${hosts[@]}"; do
        wait "$host" || die "a host has not got its file system."
    done
}

start_storage() {
    local try
    start_host storage
    for ((try = 0; try < 300; try++)); do # before that its root is still the machine's
        ! in_host storage test -e /run/ready || break
        sleep 0.1
    done
    in_host storage test -e /run/ready || die "storage did not start; see $CLUSTER_STATE/storage/console.log"
    in_storage mkdir -p /bricks
    in_storage mountpoint -q /bricks || in_storage mount -t tmpfs -o "size=$BRICK_SIZE,mode=755" tmpfs /bricks
    start_server
}

in_storage() { in_host storage env PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 "$@"; }

start_server() { # and wait for its answer
    local try
    in_storage pgrep --exact glusterd >/dev/null || in_storage glusterd
    for ((try = 0; try < 120; try++)); do
        ! in_storage timeout 20 gluster --mode=script volume list &>/dev/null || return 0
        sleep 0.5
    done
    die "glusterd does not answer; see $CLUSTER_STATE/storage/upper/var/log/glusterfs/glusterd.log"
}

# disk full|free: the bricks' file system has no byte left, or has.
disk() {
    local used
    [[ ${1:-} =~ ^(full|free)$ ]] || die "disk full or free?"
    pid_of storage >/dev/null || die "there is no file server: file-system gluster first."
    used=$(in_storage df --output=used --block-size=1 /bricks | tail -n 1)
    [[ $1 == full ]] || used=$BRICK_SIZE
    in_storage mount -o "remount,size=${used// /}" /bricks
}

# server stop|start: its processes end at once, and come back.
server() {
    [[ ${1:-} =~ ^(stop|start)$ ]] || die "server stop or start?"
    pid_of storage >/dev/null || die "there is no file server: file-system gluster first."
    if [[ $1 == start ]]; then
        start_server
    else # the bricks' processes last: glusterd would start them again
        in_storage pkill --signal KILL --exact glusterd || true
        in_storage pkill --signal KILL --exact glusterfsd || true
    fi
}

# link HOST cut|whole|MILLISECONDS [PERCENT]: its cable passes nothing on, all, or each frame late but for so many.
link() {
    local host=${1:-} how=${2:-} switch
    [[ " ${HOSTS[*]} storage " == *" $host "* && $how =~ ^(cut|whole|[0-9]+)$ ]] ||
        die "link HOST cut, whole, or MILLISECONDS and the percentage of frames that is lost?"
    switch=$(pid_of switch) || die "the cluster is not up."
    stop_host "link-$host"
    in_switch ip link delete "slow-$host" 2>/dev/null || true
    in_switch ip link set "to-$host" master br0 up
    case $how in
        whole) ;;
        cut) in_switch ip link set "to-$host" down ;;
        *)
            in_switch ip link add "slow-$host" master br0 up type veth peer name "via-$host"
            in_switch ip link set "via-$host" up
            in_switch ip link set "to-$host" nomaster
            in_switch python3 "$HERE/slow_link.py" --whole "slow-$host"
            in_host "$host" python3 - --whole eth0 <"$HERE/slow_link.py"
            mkdir -p "$CLUSTER_STATE/link-$host"
            setsid nice -n -20 nsenter --target "$switch" --net python3 "$HERE/slow_link.py" "to-$host" "via-$host" "${@:2}" \
                </dev/null &>"$CLUSTER_STATE/link-$host/console.log" &
            echo "$! $(start_time $!)" >"$CLUSTER_STATE/link-$host/pid" # as a host's: stop_host ends it
            ;;
    esac
}

in_switch() { nsenter --target "$switch" --net "$@"; }

make_volume() { # make_volume NAME, with the folders that users have on it
    local name=$1 option said
    ! in_storage gluster --mode=script volume info "$name" &>/dev/null || return 0
    in_storage mkdir -p "/bricks/$name/work/$ORDINARY_USER" "/bricks/$name/tmpdir/$ORDINARY_USER"
    in_storage chown 1000:1000 "/bricks/$name/work/$ORDINARY_USER" "/bricks/$name/tmpdir/$ORDINARY_USER"
    {
        echo "volume create $name storage:/bricks/$name force"
        echo "volume set $name network.ping-timeout 10" # a server that is cut off is noticed after so many seconds
        if [[ $name == gluster ]]; then                 # nothing is kept on the clients
            for option in write-behind io-cache quick-read stat-prefetch read-ahead readdir-ahead open-behind; do
                echo "volume set $name performance.$option off"
            done
        fi
        echo "volume start $name"
    } | while read -r said; do
        # shellcheck disable=SC2086 # words
        in_storage gluster --mode=script $said </dev/null >"$CLUSTER_STATE/storage/gluster.log" 2>&1 ||
            die "gluster $said: $(<"$CLUSTER_STATE/storage/gluster.log")"
    done
}
