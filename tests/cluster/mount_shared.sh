#!/bin/bash
# What lies under /work/groupe and /tmpdir of a host of the rehearsal cluster: its own mount of a GlusterFS volume, or
# (bind) the machine's folder. On the host, as root:
#
#   mount-shared bind|gluster|gluster-stale
#
# gluster is coherent: this host keeps neither data nor names nor attributes. gluster-stale has the default caches.

set -euo pipefail

case ${1:-} in
    bind | gluster-stale) options=log-level=WARNING ;;
    gluster) options=log-level=WARNING,direct-io-mode=enable,attribute-timeout=0,entry-timeout=0,negative-timeout=0 ;;
    *)
        echo "usage: mount-shared bind|gluster|gluster-stale" >&2
        exit 2
        ;;
esac
for folder in /work/groupe /tmpdir; do
    while findmnt --types fuse.glusterfs --mountpoint "$folder" >/dev/null; do
        umount -l "$folder" # a process may be in it
    done
done
while findmnt --types fuse.glusterfs --mountpoint /srv/gluster >/dev/null; do
    umount -l /srv/gluster
done
[[ $1 != bind ]] || exit 0

mkdir -p /srv/gluster
for ((try = 1; ; try++)); do # the volume's first answers may take some seconds
    mount -t glusterfs -o "$options" "storage:/$1" /srv/gluster >/run/mount-shared.log 2>&1 &&
        [[ -d /srv/gluster/work ]] && break
    umount -l /srv/gluster 2>/dev/null || true
    if ((try == 60)); then
        echo "$(hostname) cannot mount storage:/$1:" >&2
        tail -n 5 /run/mount-shared.log "/var/log/glusterfs/srv-gluster.log" >&2 || true
        exit 1
    fi
    sleep 1
done
mount --bind /srv/gluster/work /work/groupe
mount --bind /srv/gluster/tmpdir /tmpdir
