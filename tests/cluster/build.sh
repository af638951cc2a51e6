#!/bin/bash
# Builds the two things that take time: the nodes' root file system and the container image.
#
#   cluster.sh up      calls this when its cache lacks them; nobody needs to call it by hand
#   build.sh nodes     CACHE/nodes       Debian trixie with Slurm, munge and Apptainer (1 min)
#   build.sh image     CACHE/image-root  Debian trixie with Python, torch and torchvision (2 min)
#   build.sh sif       CACHE/image.sif   image-root, packed by the nodes' own Apptainer
#
# Each target is built beside its place and moved there when complete, so a build that is killed leaves nothing
# that looks finished. Run it in mount and PID namespaces of its own (cluster.sh does): then it leaves no mount either.

set -euo pipefail

CACHE=${CLUSTER_CACHE:-/var/cache/optuna-turpan-cluster}
SUITE=trixie # the first Debian whose glibc is new enough for Apptainer's package
NODE_PACKAGES=(slurm-wlm munge squashfuse fuse3 fuse2fs gocryptfs bindfs iproute2 procps tini
    glusterfs-server glusterfs-client)
# Without OpenBLAS torch multiplies matrices with the reference BLAS, at a tenth of the speed. setuptools and wheel are
# in the site's image: with them pip installs a package that has no wheel, as one that num2words needs.
IMAGE_PACKAGES=(libopenblas0-pthread python3-torch python3-torchvision python3-pip python3-setuptools python3-wheel
    python-is-python3 ca-certificates)

# The part of the log that says why, for whoever watches.
logged() { # logged LOG COMMAND…
    local log=$1
    shift
    "$@" >>"$log" 2>&1 || {
        echo "failed: $* (all of it: $log)" >&2
        tail -n 5 "$log" >&2
        return 1
    }
}

# The mirror is the machine's own: what it can reach is its business, not this script's.
debian_mirror() {
    # shellcheck disable=SC2016 # $(REPO_URI) is apt's own notation
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' |
        sort -u | head -n 1
}

in_root() { # in_root ROOT COMMAND…
    local root=$1
    shift
    env DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot "$root" "$@"
}

apt_get() { # apt_get ROOT ARGUMENT…; a mirror's list of sid may be past its date
    local root=$1
    shift
    logged "$root.log" in_root "$root" apt-get -qq -y -o Acquire::Retries=3 -o Acquire::Check-Valid-Until=false "$@"
}

bootstrap() { # bootstrap ROOT: a minimal Debian in which apt-get works
    local root=$1
    rm -rf "$root"
    : >"$root.log"
    logged "$root.log" debootstrap --variant=minbase "$SUITE" "$root" "$(debian_mirror)"
    # A root file system that can be built again needs no fsync after each file, and no manuals.
    mkdir -p "$root/etc/dpkg/dpkg.cfg.d"
    printf '%s\n' force-unsafe-io 'path-exclude=/usr/share/doc/*' 'path-exclude=/usr/share/man/*' \
        'path-exclude=/usr/share/locale/*' >"$root/etc/dpkg/dpkg.cfg.d/rehearsal"
    # Nothing starts while packages are installed.
    printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
    chmod +x "$root/usr/sbin/policy-rc.d"
    cp -L /etc/resolv.conf "$root/etc/resolv.conf"
    mountpoint -q "$root/proc" || mount -t proc proc "$root/proc"
}

finish() { # finish ROOT PLACE
    in_root "$1" apt-get clean
    rm -rf "$1"/var/lib/apt/lists/*
    : >"$1/etc/resolv.conf" # empty, but there: apptainer wants to bind it
    umount "$1/proc"
    rm -rf "$2"
    mv "$1" "$2"
}

install_apptainer() { # only sid has the package; everything else stays with the suite
    local root=$1
    echo "deb $(debian_mirror) sid main" >"$root/etc/apt/sources.list.d/sid.list"
    printf 'Package: *\nPin: release n=sid\nPin-Priority: 100\n' >"$root/etc/apt/preferences.d/sid"
    apt_get "$root" update
    apt_get "$root" install --no-install-recommends apptainer
}

build_nodes() {
    local root=$CACHE/nodes.partial
    bootstrap "$root"
    apt_get "$root" install --no-install-recommends "${NODE_PACKAGES[@]}"
    install_apptainer "$root"
    in_root "$root" groupadd --gid 1000 groupe
    in_root "$root" useradd --uid 1000 --gid groupe --shell /bin/bash --home-dir /users/groupe/chercheur chercheur
    # Every host copies this root file system, so every host has the same key.
    [[ -s $root/etc/munge/munge.key ]] || in_root "$root" mungekey --create
    in_root "$root" chown munge:munge /etc/munge/munge.key
    chmod 400 "$root/etc/munge/munge.key"
    finish "$root" "$CACHE/nodes"
}

build_image() {
    local root=$CACHE/image-root.partial
    bootstrap "$root"
    apt_get "$root" install --no-install-recommends "${IMAGE_PACKAGES[@]}"
    # As in the site's image, `pip install` by an ordinary user goes to ~/.local and asks nothing.
    rm -f "$root"/usr/lib/python3*/EXTERNALLY-MANAGED
    finish "$root" "$CACHE/image-root"
}

# Apptainer refuses to run under a plain chroot, so this takes the nodes' root file system as its root for good.
# lz4 packs and unpacks several times faster than the default gzip: four workers import torch on few cores.
build_sif() {
    local root=$CACHE/nodes
    mount --bind "$root" "$root"
    mount --rbind /dev "$root/dev"
    mount -t proc proc "$root/proc"
    mount -t tmpfs tmpfs "$root/tmp"
    mount -t tmpfs tmpfs "$root/mnt"
    mkdir "$root/mnt/cache" "$root/mnt/old"
    mount --bind "$CACHE" "$root/mnt/cache"
    cd "$root"
    pivot_root . mnt/old
    umount -l /mnt/old
    export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TMPDIR=/mnt/cache APPTAINER_TMPDIR=/mnt/cache
    rm -f /mnt/cache/image.sif.partial
    apptainer --quiet build --mksquashfs-args '-comp lz4' /mnt/cache/image.sif.partial /mnt/cache/image-root
    mv /mnt/cache/image.sif.partial /mnt/cache/image.sif
    rm -rf /mnt/cache/image-root
}

case ${1:-} in
    nodes | image | sif) "build_$1" ;;
    *)
        echo "usage: build.sh nodes|image|sif" >&2
        exit 2
        ;;
esac
