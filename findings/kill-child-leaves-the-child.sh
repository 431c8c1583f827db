#!/usr/bin/env bash
# `unshare --pid --fork --kill-child=TERM` leaves its child running when it is killed.
#
# The option has the child sent a signal when unshare ends in whatever way (prctl(2):
# PR_SET_PDEATHSIG). With --pid the child is the first process of its PID namespace, and such a process
# gets signals from outside only if it handles them, SIGKILL and SIGSTOP aside (pid_namespaces(7)). That
# holds for a signal of the parent's death, too: TERM, HUP and the like are thrown away without a word,
# and the child lives on. virtiofsd 1.13 sets PR_SET_PDEATHSIG to SIGTERM for the process that serves,
# which is the first of a PID namespace, so killing the process that was started leaves that one
# behind. The guess before it was run: the child ends by SIGTERM, as it does without --pid.
#
# Needs user namespaces. The pinned unshare is unpacked in a temporary folder. Ends with another status
# than 0 if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

apt-get download -qq util-linux=2.38.1-5+deb12u3 2> /dev/null
dpkg -x util-linux_*.deb .
unshare=$folder/usr/bin/unshare
"$unshare" --version
uname -r

# What becomes of a child when its unshare, with these options, is killed.
child_of() {
    "$unshare" --user --map-root-user "$@" sleep 600 &
    local parent=$! child state
    until child=$(cat "/proc/$parent/task/$parent/children") && [[ $child ]] &&
        [[ $(cat "/proc/${child// /}/comm") == sleep ]]; do sleep 0.1; done
    child=${child// /}
    kill -KILL "$parent"
    wait "$parent" 2> /dev/null || true
    sleep 1
    state=$(sed -n 's/^State:\t\([A-Z]\).*/\1/p' "/proc/$child/status" 2> /dev/null || true)
    case $state in '' | Z) echo ended ;; *) echo "lives on" ;; esac
    kill -KILL "$child" 2> /dev/null || true
}
without=$(child_of --fork --kill-child=TERM)
term=$(child_of --pid --fork --kill-child=TERM)
hup=$(child_of --pid --fork --kill-child=HUP)
kill=$(child_of --pid --fork --kill-child=KILL)
echo "without --pid, TERM: $without"
echo "with --pid, TERM: $term"
echo "with --pid, HUP: $hup"
echo "with --pid, KILL: $kill"
[[ "$without/$term/$hup/$kill" == "ended/lives on/lives on/ended" ]] && echo "as it was when this was written"

# Seen:
# unshare from util-linux 2.38.1
# 6.18.44
# without --pid, TERM: ended
# with --pid, TERM: lives on
# with --pid, HUP: lives on
# with --pid, KILL: ended
