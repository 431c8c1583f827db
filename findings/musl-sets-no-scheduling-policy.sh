#!/usr/bin/env bash
# musl's sched_setscheduler(2) never asks the kernel: it fails with ENOSYS, and so does what asks for the
# policy.
#
# POSIX has these functions change a process, Linux a thread, and musl does neither: all of
# sched_getparam, sched_getscheduler, sched_setparam and sched_setscheduler return ENOSYS, while the
# kernel takes the same calls by syscall(2). A program that is linked to glibc for its tests and to musl for
# its release changes policies in its tests only; one that takes ENOSYS for an old kernel is mistaken.
# The guess before it was run: a thin wrapper, as glibc's is.
#
# Needs Debian's musl-tools, which is installed where it is missing. Ends with another status than 0 if the
# behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

command -v musl-gcc > /dev/null || apt-get install -y -qq musl-tools=1.2.3-1 > /dev/null
dpkg-query -W musl-tools

cat > policy.c << 'END'
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BATCH 3 /* SCHED_BATCH, include/uapi/linux/sched.h */

static void tell(const char *what, long result) {
    printf("%s: %ld %s\n", what, result, result < 0 ? strerror(errno) : "");
}

int main(void) {
    struct sched_param parameters = {0};
    int priority = 0;
    tell("musl sets", sched_setscheduler(0, BATCH, &parameters));
    tell("musl gets", sched_getscheduler(0));
    tell("syscall sets", syscall(SYS_sched_setscheduler, 0, BATCH, &priority));
    tell("syscall gets", syscall(SYS_sched_getscheduler, 0));
    return 0;
}
END
musl-gcc -static -o policy policy.c
said=$(./policy)
echo "$said"
[[ $said == *"musl sets: -1 Function not implemented"* && $said == *"musl gets: -1"* ]]
[[ $said == *"syscall sets: 0"* && $said == *"syscall gets: 3"* ]] && echo "as it was when this was written"

# Seen:
# musl-tools	1.2.3-1
# musl sets: -1 Function not implemented
# musl gets: -1 Function not implemented
# syscall sets: 0
# syscall gets: 3
