#!/usr/bin/env bash
# firecracker-python's `ProcessManager.stop` takes seven seconds, and sends SIGKILL, for a VMM that ended
# at once when it got SIGTERM.
#
# It asks by kill(pid, 0) whether the process is there. The process is a child of the program that called
# `ProcessManager.start`, which keeps no Popen object, so nobody waits for it: it stays a zombie, and
# kill(2) finds zombies. `stop` waits two seconds after SIGTERM and five after SIGKILL, takes the process
# for one that outlived both, then removes its files and says that all went well. A VMM cannot end faster
# than at once: who wants a quick stop has to reap the child (SIGCHLD ignored, say). The guess before it
# was run: `stop` ends with an error, as the process seems to live.
#
# `sleep` stands for a VMM that ends by SIGTERM. The package is installed in a temporary folder. Ends with
# another status than 0 if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check firecracker-python==0.0.5
venv/bin/pip list --disable-pip-version-check 2> /dev/null | grep firecracker
cp "$(command -v sleep)" firecracker
cat > stop.py << 'END'
import os
import signal
import sys
import time

from firecracker.process import ProcessManager

if sys.argv[1] == "reaped":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
manager = ProcessManager()
manager._config.data_path = os.getcwd()
manager._config.binary_path = os.path.join(os.getcwd(), "firecracker")
name = sys.argv[1]
os.mkdir(name)
pid = manager.start(name, ["600"])
started = time.monotonic()
outcome = manager.stop(name)
took = time.monotonic() - started
try:
    state = open(f"/proc/{pid}/stat").read().rsplit(") ", 1)[1][0]
except FileNotFoundError:
    state = "gone"
print(f"{name}: stop says {outcome} after {took:.0f} s; the process is {state}")
END
zombie=$(venv/bin/python stop.py zombie 2> /dev/null | tail -n 1)
reaped=$(venv/bin/python stop.py reaped 2> /dev/null | tail -n 1)
echo "$zombie"
echo "$reaped"
# firecracker-python 0.0.5, Python 3.11, Linux 6.18:
#   zombie: stop says True after 7 s; the process is Z
#   reaped: stop says True after 1 s; the process is gone
[[ $zombie == *"True after 7 s; the process is Z" && $reaped == *"True after 1 s; the process is gone" ]]
