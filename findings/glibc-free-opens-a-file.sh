#!/usr/bin/env bash
# glibc's free(3) opens /proc/sys/vm/overcommit_memory, but only in a thread other than the first.
#
# Memory of such threads comes from heaps of their own. When the top of one is given back, glibc asks whether
# the host counts memory strictly, once a process, and reads that file for it. A seccomp filter for code
# that only computes, made from what the first thread was seen to do (mmap, munmap, brk, madvise), kills
# the program at a free, and on a thread only; where the call is refused, free goes on without.
# The guess before it was run: memory management makes no system calls that name a file.
#
# Needs Debian's strace and gcc, which are installed where they are missing. Ends with another status than
# 0 if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

command -v strace > /dev/null || apt-get install -y -qq strace=6.1-0.1 > /dev/null
command -v gcc > /dev/null || apt-get install -y -qq gcc=4:12.2.0-3 libc6-dev > /dev/null
dpkg-query -W libc6 strace

cat > free.c << 'END'
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* Takes memory in pieces that are too small for mappings of their own, and gives all of it back. */
static void *work(void *unused) {
    enum { PIECES = 64, BYTES = 100000 };
    void *pieces[PIECES];
    for (int i = 0; i < PIECES; i++)
        memset(pieces[i] = malloc(BYTES), 1, BYTES);
    for (int i = PIECES - 1; i >= 0; i--)
        free(pieces[i]);
    return unused;
}

int main(int count, char **words) {
    pthread_t thread;
    (void)words;
    if (count == 1)
        work(NULL);
    else if (pthread_create(&thread, NULL, work, NULL) == 0)
        pthread_join(thread, NULL);
    return 0;
}
END
gcc -O0 -pthread -o free free.c
opened() {
    strace -f -e trace=openat,open ./free "$@" 2>&1 | grep -c overcommit_memory || true
}
first=$(opened)
other=$(opened thread)
echo "the first thread opens it $first times, another one $other times"
[[ $first == 0 && $other == 1 ]] && echo "as it was when this was written"

# Seen:
# libc6:amd64	2.36-9+deb12u14
# strace	6.1-0.1
# the first thread opens it 0 times, another one 1 times
