#!/bin/busybox sh
# Installs a Debian system from packages, in an emulated machine with nothing but busybox, and
# writes it as an ext4 file system to the disk with the serial number "root".
#
# /image/base and /image/rest hold the packages, /image/files what is ours; /image/settings sets
# epoch (seconds since 1970, of every later file), label, uuid and release.
#
# The steps are those of Debian's own installers for foreign machines: the essential packages are
# unpacked without dpkg, then dpkg installs them properly over themselves, then all others.
set -e
. /image/settings

step() { echo "== $*"; }

for disk in /sys/block/vd*; do
    [ "$(cat "$disk/serial")" = root ] && output=/dev/${disk##*/}
done
[ -b "$output" ] || { echo "no disk to write to"; exit 1; }

step "unpacking the essential packages"
system=/system
mkdir $system
mount -t tmpfs -o size=90%,mode=755 tmpfs $system
# This one makes the folders that others' names lead through.
for package in /image/base/base-files_*.deb /image/base/*.deb; do
    ar p "$package" data.tar | tar -x -C $system
done

mkdir -p $system/proc $system/sys $system/dev $system/packages $system/var/lib/dpkg/info
mount --bind /proc $system/proc
mount --bind /sys $system/sys
mount --bind /dev $system/dev
mount --bind /image $system/packages
touch $system/var/lib/dpkg/status $system/var/lib/dpkg/available
# No daemon starts here.
printf '#!/bin/sh\nexit 101\n' >$system/usr/sbin/policy-rc.d
chmod 755 $system/usr/sbin/policy-rc.d
# Folders that are there already keep their permissions.
put() {
    mkdir -p "$system/${1%/*}"
    cp "/image/files/$1" "$system/$1"
}
# The new initramfs hangs on these.
put etc/fstab
put etc/initramfs-tools/conf.d/image
echo "armlet" >$system/etc/hostname

# Busybox would run its own dpkg and sh, which are not Debian's, if it were not for env.
inside() {
    chroot $system /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root \
        LC_ALL=C.UTF-8 TERM=dumb DEBIAN_FRONTEND=noninteractive \
        DEBCONF_NONINTERACTIVE_SEEN=true SOURCE_DATE_EPOCH="$epoch" "$@"
}

step "installing the essential packages"
inside sh -c 'dpkg --force-depends --force-unsafe-io --install /packages/base/*.deb'
step "unpacking the other packages"
inside sh -c 'dpkg --force-depends --force-unsafe-io --unpack /packages/rest/*.deb'
step "setting up"
inside dpkg --force-unsafe-io --configure --pending
inside dpkg --audit

step "configuring"
for file in $(cd /image/files && find . -type f); do put "$file"; done
# "armlet" is the password as well.
inside useradd --create-home --shell /bin/bash --groups sudo,adm \
    --password '$6$armlet$nj29JWXKMIgmssfmKVKhSrxUGO.scgtKAp0EG9fy.QMNIsHgZo0ibdN3B0zP2kP0vouhBsQKlUb0mh7jXDHqa1' armlet
mkdir -m 700 $system/home/armlet/.ssh
cp /image/authorized_keys $system/home/armlet/.ssh/
inside chown -R armlet:armlet /home/armlet
rm -f $system/etc/ssh/ssh_host_*
cp /image/hostkey $system/etc/ssh/ssh_host_ed25519_key
cp /image/hostkey.pub $system/etc/ssh/ssh_host_ed25519_key.pub
chmod 600 $system/etc/ssh/ssh_host_ed25519_key
chmod 440 $system/etc/sudoers.d/armlet
# The capability that it has instead does not outlive every way of copying a file system.
chmod u+s $system/usr/bin/ping 2>/dev/null || true
inside systemctl enable systemd-networkd systemd-resolved ssh

step "cleaning"
rm $system/usr/sbin/policy-rc.d
rm -rf $system/var/cache/apt/*.bin $system/var/lib/apt/lists/* $system/var/log/* $system/tmp/*
rm -rf $system/var/cache/debconf/*-old $system/var/lib/dpkg/*-old $system/var/cache/ldconfig
rm -f $system/etc/passwd- $system/etc/group- $system/etc/shadow- $system/etc/gshadow-
rm -f $system/etc/subuid- $system/etc/subgid- $system/var/lib/systemd/random-seed
mkdir -p $system/var/log/journal
# Systemd fills it in at the first boot.
: >$system/etc/machine-id
umount $system/packages $system/dev $system/sys $system/proc
rmdir $system/packages

step "writing the file system"
# mke2fs is the new system's own, so that it is the same on every machine. A copy of the tree by
# tar gives it times that do not depend on this run.
mount --bind /proc $system/proc
mount --bind /dev $system/dev
mkdir /tree
mount --bind $system /tree
mkdir $system/tree
mount --bind /tree $system/tree
inside sh -c "find /tree -xdev -newermt @$epoch -print0 | xargs -0r touch --no-dereference --date=@$epoch"
inside mke2fs -q -F -t ext4 -b 4096 -L "$label" -U "$uuid" -E "hash_seed=$uuid,lazy_itable_init=1" \
    -d /tree "$output"
sync
step "done"
