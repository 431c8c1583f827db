#!/usr/bin/env bash
# musl's raise(3), abort(3) and pthread_kill(3) call tkill(2), glibc's tgkill(2).
#
# tkill takes the number of any thread of the system, tgkill that of the process, too. A seccomp filter can
# look at arguments, so it can bind a program's signals to the program itself, but only if they go by
# tgkill: with musl, either abort() and panics are killed by the filter instead, without their message, or
# the filter lets the program signal whatever its user may.
# The guess before it was run: both as glibc; tgkill is there since Linux 2.5.75, and tkill's manual page
# calls it obsolete.
#
# Needs Debian's musl-tools, strace and gcc, which are installed where they are missing. Ends with another
# status than 0 if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

command -v musl-gcc > /dev/null || apt-get install -y -qq musl-tools=1.2.3-1 > /dev/null
command -v strace > /dev/null || apt-get install -y -qq strace=6.1-0.1 > /dev/null
command -v gcc > /dev/null || apt-get install -y -qq gcc=4:12.2.0-3 libc6-dev > /dev/null
dpkg-query -W musl-tools libc6 strace

cat > raise.c << 'END'
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>

int main(void) {
    signal(SIGUSR1, SIG_IGN);
    raise(SIGUSR1);
    pthread_kill(pthread_self(), SIGUSR1);
    abort();
}
END
musl-gcc -static -o with-musl raise.c
gcc -pthread -o with-glibc raise.c
calls() {
    { strace -e trace=kill,tkill,tgkill "./$1" 2>&1 || true; } 2> /dev/null | sed -n 's/^\(t\?g\?kill\)(.*/\1/p' | tr '\n' ' '
}
musl=$(calls with-musl)
glibc=$(calls with-glibc)
echo "musl: $musl"
echo "glibc: $glibc"
[[ $musl == "tkill tkill tkill " && $glibc == "tgkill tgkill tgkill " ]] && echo "as it was when this was written"

# Seen:
# libc6:amd64	2.36-9+deb12u14
# musl-tools	1.2.3-1
# strace	6.1-0.1
# musl: tkill tkill tkill
# glibc: tgkill tgkill tgkill
