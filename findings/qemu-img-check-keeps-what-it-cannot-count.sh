#!/usr/bin/env bash
# `qemu-img check -r all` leaves entries that point behind the end of a qcow2 image, and says nothing
# else about them than the check does; `qemu-img convert` reads the same image without a word.
#
# After a power cut on a program that does not keep an order of writes, an L2 entry may lead to a cluster
# that the file does not reach. qemu-img(1) says of `-r all` that it "fixes all kinds of errors". It
# counts such an entry as an error and keeps it, each time it is run. Advice that names `-r all` as the
# repair sends users in a circle; what works is to convert the image (what was lost reads as zeros). The
# guess before it was run: the entries are dropped, as fsck does with blocks out of range.
#
# Needs Debian's qemu-utils, which is installed where it is missing. Ends with another status than 0 if
# the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

command -v qemu-img > /dev/null || apt-get install -y -qq qemu-utils=1:10.0.2+ds-2+deb13u1~bpo12+1
qemu-img --version | head -n 1

qemu-img create -q -f qcow2 x.qcow2 1M
qemu-io -f qcow2 -c "write -q -P 7 0 192k" x.qcow2
# The file ends before the second of three clusters of data.
truncate -s $((6 * 65536)) x.qcow2
status() { "$@" > said 2>&1 && echo 0 || echo $?; }
errors() { grep -c 'region exceeding the end' said || true; }
first=$(status qemu-img check -r all x.qcow2)
echo "check -r all: status $first, $(errors) lines of entries behind the end"
second=$(status qemu-img check -r all x.qcow2)
echo "check -r all, again: status $second"
third=$(status qemu-img check x.qcow2)
left=$(errors)
echo "check: status $third, $left entries behind the end"
converted=$(status qemu-img convert -O qcow2 x.qcow2 new.qcow2)
checked=$(status qemu-img check -q new.qcow2)
echo "convert: status $converted, and a check of what it made: $checked"
[[ $second == 2 && $third == 2 && $left -gt 0 && $converted$checked == 00 ]] && echo "as it was when this was written"

# Seen:
# qemu-img version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)
# check -r all: status 2, 2 lines of entries behind the end
# check -r all, again: status 2
# check: status 2, 2 entries behind the end
# convert: status 0, and a check of what it made: 0
# as it was when this was written
