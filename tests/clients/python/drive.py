"""Drives guests with a Firecracker client in Python, as its users do.

`drive.py NAME FOLDER` runs the client NAME. FOLDER has `firecracker`, the kernel `guest` and the image
`disk`. Network devices are made in the network namespace that this runs in. The last line printed says
what was done; anything that goes wrong ends it with a traceback.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

#: What the guest prints when it listens to its power button.
READY = "guest ready"
#: How long a guest may take to print that, and to end, in seconds.
PATIENCE = 30


class Setup:
    """The files that clients are given, and a folder for theirs."""

    def __init__(self, folder: Path, scratch: Path):
        self.firecracker = str(folder / "firecracker")
        self.guest = str(folder / "guest")
        self.scratch = scratch
        self.disk = str(scratch / "disk")
        shutil.copy(folder / "disk", self.disk)


def until(what, condition):
    """Waits until `condition` holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {PATIENCE} s")
        time.sleep(0.02)


def has(path, text=READY):
    """Returns whether the file at `path` has `text` in it."""
    path = Path(path)
    return path.exists() and text in path.read_text(errors="replace")


def ended(pid):
    """Returns whether the process `pid` has ended."""
    try:
        os.waitpid(pid, os.WNOHANG)
        os.kill(pid, 0)
    except (ChildProcessError, ProcessLookupError):
        pass
    state = Path(f"/proc/{pid}/stat")
    try:
        return state.read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def tap(name):
    """Makes a TAP, which clients have made before they start anything."""
    subprocess.run(["ip", "tuntap", "add", "dev", name, "mode", "tap"], check=True)


def expect_state(request, state):
    """Checks what `GET /` says of the guest."""
    seen = request()["state"]
    assert seen == state, f"the guest is {seen}, not {state}"


def get(socket, path="/"):
    """Asks for `path` with the client of microheart, the plainest of them."""
    from microheart import api

    return api.request(socket, "GET", path)


def dud(setup):
    from dud.backends.firecracker import FirecrackerSession
    from dud.backends.vm import BootSpec

    os.environ["DUD_FIRECRACKER"] = setup.firecracker
    os.environ["DUD_FC_METRICS"] = "1"
    # The session would wait for an agent in the guest, so it is made without its constructor.
    session = object.__new__(FirecrackerSession)
    session._rundir = str(setup.scratch)
    session._preflight()
    session._console = str(setup.scratch / "console")
    session._vmm_log = open(session._console, "ab")
    data, scratch = (shutil.copy(setup.disk, setup.scratch / name) for name in ("data", "scratch"))
    spec = BootSpec(
        kernel=Path(setup.guest),
        cmdline=session._console_arg(),
        rootfs=Path(setup.disk),
        medium="erofs",
        disks=[Path(data)],
        scratch_clone=Path(scratch),
        rundir=session._rundir,
        console=session._console,
        listen_path=session._listen_path(),
        cpus=1,
        memory_mib=128,
    )
    session._proc = session._spawn_vmm(spec)
    session._configure_vmm(spec)
    until("the guest's console", lambda: has(session._console))
    for state, seen in [("Paused", "Paused"), ("Resumed", "Running")]:
        session._api("PATCH", "/vm", {"state": state})
        expect_state(lambda: get(session._api_sock), seen)
    assert has(setup.scratch / "metrics", "utc_timestamp_ms"), "no metrics"
    started = time.monotonic()
    session._teardown_vm()
    assert session._proc.returncode == -signal.SIGTERM, session._proc.returncode
    assert time.monotonic() - started < 4, "SIGTERM took too long"
    return "3 drives, vsock, entropy, metrics; start, pause, resume, SIGTERM"


def smolvm(setup):
    from smolvm.types import NetworkConfig, VMConfig, VMInfo, VMState
    from smolvm.vm import SmolVMManager

    manager = SmolVMManager(
        data_dir=setup.scratch / "data", socket_dir=setup.scratch, backend="firecracker"
    )
    adapter = manager._runtime_adapter_for_backend("firecracker")
    tap("smoltap")
    info = VMInfo(
        vm_id="vm-one",
        status=VMState.CREATED,
        config=VMConfig(
            vm_id="vm-one",
            kernel_path=Path(setup.guest),
            rootfs_path=Path(setup.disk),
            vcpu_count=1,
            memory=512,
            vsock={"guest_cid": 3},
            network_rate_limit_mbps=100,
        ),
        network=NetworkConfig(
            guest_ip="172.16.0.2",
            gateway_ip="172.16.0.1",
            netmask="255.255.255.0",
            tap_device="smoltap",
            guest_mac="AA:FC:00:00:00:01",
        ),
    )
    log = setup.scratch / "log"
    launch = adapter.start(info, log_path=log, boot_timeout=10)
    info = info.model_copy(
        update={
            "status": VMState.RUNNING,
            "pid": launch.pid,
            "control_socket_path": launch.control_socket_path,
        }
    )
    until("the guest's console", lambda: has(log))
    assert launch.vsock_uds_path.is_socket()
    # A start that is sent again is forgiven by the words of its refusal.
    from smolvm.api import FirecrackerClient, _instance_start_already_succeeded
    from smolvm.exceptions import FirecrackerAPIError

    client = FirecrackerClient(launch.control_socket_path)
    try:
        client.start_instance()
        raise AssertionError("a second start was taken")
    except FirecrackerAPIError as error:
        assert _instance_start_already_succeeded(str(error)), error
    request = lambda: get(str(launch.control_socket_path))
    adapter.pause(info)
    expect_state(request, "Paused")
    adapter.resume(info)
    expect_state(request, "Running")
    # SendCtrlAltDel, then a wait for the end.
    adapter.stop(info, timeout=PATIENCE)
    assert has(log, "guest pressed"), "the guest was killed"
    manager.close()
    return "drive, network with limits, vsock; start twice, pause, resume, SendCtrlAltDel"


def bandsox(setup):
    from bandsox.vm import MicroVM

    vm = MicroVM("band5001", str(setup.scratch / "api.sock"), firecracker_bin=setup.firecracker)
    console = []
    vm.start_process()
    vm.multiplexer.add_callback(console.append)
    assert vm.client.wait_for_socket()
    vm.configure(
        setup.guest, setup.disk, 1, 128, enable_vsock=False, disk_bandwidth_mbps=100, disk_iops=1000
    )
    vm._setup_vsock_bridge(3, 9000)
    vm.start()
    until("the guest's console", lambda: READY in "".join(console))
    vm.pause()
    expect_state(lambda: get(vm.socket_path), "Paused")
    vm.resume()
    expect_state(lambda: get(vm.socket_path), "Running")
    vm.update_drive("rootfs", setup.disk)
    process = vm.process
    vm.stop()
    until("the end", lambda: process.poll() is not None)
    return "drive (Async) with limits, entropy with limits, network, vsock; start, pause, resume, end"


def firecracker_python(setup):
    import firecracker.process
    from firecracker.config import MicroVMConfig
    from firecracker.microvm import MicroVM
    from firecracker.process import ProcessManager
    from firecracker.vmm import VMMManager

    MicroVMConfig.data_path = str(setup.scratch)
    MicroVMConfig.binary_path = setup.firecracker
    # The constructor wants Docker and a public address: neither has to do with the VMM.
    vm = object.__new__(MicroVM)
    vm._config = MicroVMConfig()
    vm._config.data_path = str(setup.scratch)
    vm._config.binary_path = setup.firecracker
    vm._process = ProcessManager()
    vm._vmm = VMMManager()
    for part in (vm._process, vm._vmm, vm._vmm._process):
        part._config = vm._config
    vm._logger = vm._process._logger
    vm._microvm_id, vm._microvm_name = "abcd1234", "one"
    folder = setup.scratch / vm._microvm_id
    folder.mkdir()
    vm._kernel_file, vm._initrd_file, vm._init_file = setup.guest, None, "/sbin/init"
    vm._base_rootfs = vm._rootfs_file = setup.disk
    vm._overlayfs, vm._vcpu, vm._memory = False, 1, 128
    vm._iface_name, vm._host_dev_name = "eth0", f"tap_{vm._microvm_id}"
    vm._ip_addr, vm._gateway_ip = "172.16.0.2", "172.16.0.1"
    vm._mmds_enabled, vm._mmds_ip, vm._user_data = True, "169.254.169.254", "#cloud-config"
    vm._vsock_enabled, vm._vsock_guest_cid = True, 3
    vm._vsock_uds_path = str(folder / "v.sock")
    tap(vm._host_dev_name)
    vm._api = vm._vmm.get_api(vm._microvm_id)
    socket = str(folder / "firecracker.socket")
    vm._process.start(vm._microvm_id, ["--api-sock", socket])
    vm._configure_vmm_boot_source()
    vm._configure_vmm_root_drive()
    vm._configure_vmm_resources()
    vm._configure_vmm_network()
    vm._configure_vmm_mmds()
    vm._configure_vmm_vsock()
    vm._api.actions.put(action_type="InstanceStart")
    until("the guest's console", lambda: has(folder / "firecracker.log"))
    pid, _ = vm._process.get_pid(vm._microvm_id)
    assert pid in vm._process.get_pids() and vm._process.is_running(vm._microvm_id)
    assert vm._api.mmds.get().json()["latest"]["meta-data"]["local-hostname"] == "one"
    for state, seen in [("Paused", "Paused"), ("Resumed", "Running")]:
        vm._vmm.update_vmm_state(vm._microvm_id, state)
        expect_state(lambda: get(socket), seen)
    # A zombie lives on, for `stop`, so that none is to be.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    assert vm._process.stop(vm._microvm_id)
    return "drive, network, MMDS, vsock; start, pause, resume, SIGTERM"


def microheart(setup):
    from microheart import assets
    from microheart.vm import MicroVM

    home = setup.scratch / "home"
    os.environ["MICROHEART_HOME"] = str(home)
    home.mkdir()
    shutil.copy(setup.firecracker, home / "firecracker")
    shutil.copy(setup.guest, home / "vmlinux-1")
    key = setup.scratch / "key"
    key.touch()
    # The guest has no SSH: what stands for `ssh` says yes, and presses the power button for `reboot`.
    os.environ["ARMLET_API_SOCKET"] = str(home / "vms/one/firecracker.socket")
    vm = MicroVM("one", rootfs=setup.disk, key=str(key), mem_mib=128)
    assert vm.start(wait=PATIENCE) is not None, "it ran already"
    pid = vm.pid()
    until("the guest's console", lambda: has(vm.console))
    assert vm.machine_config()["mem_size_mib"] == 128
    from microheart import api

    for state, seen in [("Paused", "Paused"), ("Resumed", "Running")]:
        api.request(vm.sock, "PATCH", "/vm", {"state": state})
        expect_state(lambda: get(vm.sock), seen)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    console = vm.console.read_text
    vm.stop()
    assert "guest pressed" in console(), "the guest was killed"
    assert ended(pid)
    vm.clean()
    return "--config-file, --enable-pci, drive, network; pause, resume, reboot"


CLIENTS = {
    "dud": dud,
    "smolvm": smolvm,
    "bandsox": bandsox,
    "firecracker-python": firecracker_python,
    "microheart": microheart,
}


def main():
    name, folder = sys.argv[1], Path(sys.argv[2])
    with tempfile.TemporaryDirectory(prefix="armlet-client-") as scratch:
        done = CLIENTS[name](Setup(folder, Path(scratch)))
    print(done)


if __name__ == "__main__":
    main()
