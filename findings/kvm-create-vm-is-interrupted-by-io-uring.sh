#!/usr/bin/env bash
# KVM_CREATE_VM fails with EINTR though no signal comes, while requests of io_uring are under way.
#
# io_uring finishes a request by work of the thread that submitted it, for which it wakes that thread
# with TIF_NOTIFY_SIGNAL. KVM_CREATE_VM registers an MMU notifier, which asks signal_pending() for each
# mapping of the process (mm_take_all_locks), and that is true then. The program below sets no handler
# and gets no signal. The guess before it was run: a thread that gets no signal gets no EINTR from an
# ioctl that does not wait for anything.
#
# Needs a C compiler and /dev/kvm. The pinned liburing is unpacked in a temporary folder. Ends with
# another status than 0 if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

apt-get download -qq liburing-dev=2.3-3 2> /dev/null
dpkg -x liburing-dev_*.deb .
dpkg-deb --show liburing-dev_*.deb
uname -r

cat > program.c << 'END'
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>
#include <liburing.h>
#include <linux/kvm.h>

int main(int count, char **words) {
    int kvm = open("/dev/kvm", O_RDWR), file = open(words[1], O_RDWR | O_CREAT, 0600);
    struct io_uring ring;
    if (kvm < 0 || file < 0 || io_uring_queue_init(64, &ring, 0)) return 2;
    for (int pending = 0; pending <= 16; pending += 16) {
        int interrupted = 0, made = 0;
        for (int turn = 0; turn < 1000; turn++) {
            struct io_uring_cqe *cqe;
            for (int i = 0; i < pending; i++) {
                struct io_uring_sqe *sqe = io_uring_get_sqe(&ring);
                io_uring_prep_fsync(sqe, file, 0);
                sqe->flags |= IOSQE_ASYNC;
            }
            if (pending) io_uring_submit(&ring);
            int vm = ioctl(kvm, KVM_CREATE_VM, 0);
            if (vm < 0 && errno == EINTR) interrupted++;
            if (vm >= 0) made++, close(vm);
            for (int i = 0; i < pending; i++) {
                if (io_uring_wait_cqe(&ring, &cqe)) return 2;
                io_uring_cqe_seen(&ring, cqe);
            }
        }
        fprintf(stderr, "%d made, %d interrupted\n", made, interrupted);
        printf("%d under way: %s made, %s interrupted\n", pending, made ? "some" : "none",
               interrupted ? "some" : "none");
    }
}
END
cc -O1 -Iusr/include program.c -o program usr/lib/*/liburing.a
output=$(./program file)
echo "$output"
[[ "$output" == "0 under way: some made, none interrupted
16 under way: some made, some interrupted" ]] && echo "as it was when this was written"

# Seen:
# liburing-dev 2.3-3
# 6.18.44-fc-v595
# 1000 made, 0 interrupted
# 536 made, 464 interrupted
# 0 under way: some made, none interrupted
# 16 under way: some made, some interrupted
# as it was when this was written
