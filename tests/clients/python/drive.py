"""Drives guests with a Firecracker client in Python, as its users do.

`drive.py NAME FOLDER` runs the client NAME. FOLDER has `firecracker`, the kernel `guest` and the image
`disk`. Network devices are made in the network namespace that this runs in. The last line printed says
what was done; anything that goes wrong ends it with a traceback.
"""

import gc
import os
import re
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


def press(socket):
    """Presses the guest's power button, after which it says so and resets."""
    from microheart import api

    api.request(socket, "PUT", "/actions", {"action_type": "SendCtrlAltDel"})


def expect_gone_on(console, socket, pid):
    """Checks that a guest goes on from a snapshot: it is one that says nothing of a start, and listens to
    its power button. `console` returns what it printed since."""
    expect_state(lambda: get(socket), "Running")
    press(socket)
    until("the restored guest's end", lambda: ended(pid))
    assert "guest pressed" in console() and READY not in console(), console()


class Silence:
    """What stands for dud's channel to its agent in the guest, which this guest does not have."""

    def __init__(self, *_, **__):
        pass

    def hello_recv(self):
        pass

    def close(self):
        pass


def dud_session(setup, folder):
    """A session of dud in a folder of its own; it is made without its constructor, which would wait for
    an agent in the guest."""
    import socket

    from dud.backends.firecracker import FirecrackerSession

    class Session(FirecrackerSession):
        def _accept(self, timeout):
            return None

        def _request(self, *_):
            pass

    folder.mkdir()
    session = object.__new__(Session)
    session._rundir = str(folder)
    session._preflight()
    session._console = str(folder / "console")
    session._vmm_log = open(session._console, "ab")
    session._sock_path = session._listen_path()
    session._srv = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    session._srv.bind(session._sock_path)
    session._ch, session._pool, session._pool_kwargs = Silence(), None, {"memory_mib": 128}
    session.frozen = session._closed = False
    session._kernel_path = Path(setup.guest)
    return session


def dud(setup):
    import types

    from dud.backends import firecracker, golden
    from dud.backends.vm import BootSpec

    os.environ["DUD_FIRECRACKER"] = setup.firecracker
    os.environ["DUD_FC_METRICS"] = "1"
    firecracker.Channel = Silence

    def boot(session, **more):
        session.build = types.SimpleNamespace(rootfs_path=Path(setup.disk))
        spec = BootSpec(
            kernel=Path(setup.guest),
            cmdline=session._console_arg(),
            rootfs=Path(setup.disk),
            medium="erofs",
            rundir=session._rundir,
            console=session._console,
            listen_path=session._sock_path,
            cpus=1,
            memory_mib=128,
            **({"disks": [], "scratch_clone": None} | more),
        )
        session._proc = session._spawn_vmm(spec)
        session._configure_vmm(spec)

    console = lambda session: Path(session._console).read_text(errors="replace")
    data, scratch = (
        Path(shutil.copy(setup.disk, setup.scratch / name)) for name in ("data", "scratch")
    )
    session = dud_session(setup, setup.scratch / "first")
    boot(session, disks=[data], scratch_clone=scratch)
    until("the guest's console", lambda: has(session._console))
    for state, seen in [("Paused", "Paused"), ("Resumed", "Running")]:
        session._api("PATCH", "/vm", {"state": state})
        expect_state(lambda: get(session._api_sock), seen)
    metrics = Path(session._rundir, "metrics")
    assert has(metrics, "utc_timestamp_ms"), "no metrics"
    # A freeze ends the VMM by SIGTERM; the second one replaces the files of the first.
    for _ in range(2):
        started = time.monotonic()
        session.freeze()
        assert session._proc.returncode == -signal.SIGTERM, session._proc.returncode
        assert time.monotonic() - started < 20, "the freeze took too long"
        metrics.unlink()
        session.thaw()
        expect_state(lambda: get(session._api_sock), "Running")
    assert has(metrics, "utc_timestamp_ms"), "no metrics of the restored guest"
    press(session._api_sock)
    session._proc.wait(PATIENCE)
    assert console(session).count(READY) == 1, console(session)
    assert "guest pressed" in console(session), console(session)
    # Another machine becomes one that is never booted again, only cloned, more than once at a time.
    seed = dud_session(setup, setup.scratch / "seed")
    boot(seed)
    until("the guest's console", lambda: has(seed._console))
    seed.freeze()
    template = setup.scratch / "golden"
    assert golden.publish_frozen(seed, template) and golden.usable(template)
    golden.verify(template, Path(setup.disk), Path(setup.guest))
    shutil.rmtree(seed._rundir)
    clones = [dud_session(setup, setup.scratch / name) for name in ("one", "two")]
    for clone in clones:
        boot(clone, restore_from=template)
    for clone in clones:
        assert Path(clone._vsock_uds).is_socket()
        expect_state(lambda: get(clone._api_sock), "Running")
        press(clone._api_sock)
        clone._proc.wait(PATIENCE)
        assert "guest pressed" in console(clone) and READY not in console(clone), console(clone)
    return "3 drives, vsock, entropy, metrics; start, pause, resume, freeze, thaw, two clones, SIGTERM"


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
    snapshots = [
        smolvm_snapshot(adapter, info, setup, kind, setup.scratch / f"snapshot-{kind}")
        for kind in ("full", "diff")
    ]
    # SendCtrlAltDel, then a wait for the end.
    adapter.stop(info, timeout=PATIENCE)
    assert has(log, "guest pressed"), "the guest was killed"
    for snapshot in snapshots:
        from smolvm.runtime.base import SnapshotRestoreRequest

        log = setup.scratch / f"log-{snapshot.snapshot_type.value}"
        launch = adapter.restore_snapshot(
            SnapshotRestoreRequest(
                snapshot=snapshot,
                managed_disk_path=Path(setup.disk),
                log_path=log,
                resume_vm=False,
                boot_timeout=10,
            )
        )
        assert launch.status == VMState.PAUSED and launch.vsock_uds_path.is_socket()
        update = {"pid": launch.pid, "control_socket_path": launch.control_socket_path}
        restored = info.model_copy(update=update)
        expect_state(request, "Paused")
        adapter.resume(restored)
        expect_state(request, "Running")
        adapter.stop(restored, timeout=PATIENCE)
        assert has(log, "guest pressed") and not has(log), log.read_text(errors="replace")
    manager.close()
    return "drive, network with limits, vsock; start twice, pause, resume, snapshots, SendCtrlAltDel"


def smolvm_snapshot(adapter, info, setup, kind, folder):
    """Saves a guest with smolvm, and has it go on."""
    from smolvm.runtime.base import SnapshotCreateRequest
    from smolvm.types import SnapshotInfo, SnapshotType, VMState

    kind = SnapshotType(kind)
    folder.mkdir()
    request = SnapshotCreateRequest(
        vm_info=info,
        snapshot_id=folder.name,
        snapshot_root=folder,
        managed_disk_path=Path(setup.disk),
        resume_source=True,
        original_status=VMState.RUNNING,
        snapshot_type=kind,
    )
    created = adapter.create_snapshot(request)
    assert created.artifacts.state_path.exists() and created.artifacts.memory_path.exists()
    adapter.resume(info)
    return SnapshotInfo(
        snapshot_id=folder.name,
        vm_id=info.vm_id,
        backend="firecracker",
        artifacts=created.artifacts,
        vm_config=info.config,
        network_config=info.network,
        created_at=created.captured_at,
        snapshot_type=kind,
    )


def bandsox(setup):
    from bandsox.vm import MicroVM

    def begin():
        vm = MicroVM("band5001", str(setup.scratch / "api.sock"), firecracker_bin=setup.firecracker)
        console = []
        vm.start_process()
        vm.multiplexer.add_callback(console.append)
        assert vm.client.wait_for_socket()
        return vm, console

    vm, console = begin()
    rootfs = setup.scratch / "rootfs.ext4"
    shutil.copy(setup.disk, rootfs)
    vm.configure(
        setup.guest, str(rootfs), 1, 128, enable_vsock=False, disk_bandwidth_mbps=100, disk_iops=1000
    )
    vm._setup_vsock_bridge(3, 9000)
    vm.start()
    until("the guest's console", lambda: READY in "".join(console))
    vm.pause()
    expect_state(lambda: get(vm.socket_path), "Paused")
    vm.resume()
    expect_state(lambda: get(vm.socket_path), "Running")
    # As its `snapshot_vm` does.
    vsock = vm.vsock_socket_path
    vm._cleanup_vsock_bridge()
    vm.pause()
    saved = [str(setup.scratch / name) for name in ("snapshot_file", "mem_file")]
    vm.snapshot(*saved)
    vm.resume()
    vm.update_drive("rootfs", setup.disk)
    process = vm.process
    vm.stop()
    until("the end", lambda: process.poll() is not None)
    # As its `restore_vm` does: it looks for the image that is not there in the words of the refusal,
    # puts a link in that place, and gives the guest another image.
    rootfs.unlink()
    Path(vsock).unlink()
    vm, _ = begin()
    try:
        vm.load_snapshot(*saved)
        raise AssertionError("a snapshot without its image was loaded")
    except Exception as error:
        seen = re.search(
            r"(?:No such file or directory|os error 2).*? (/[\w\-/.]+\.ext4)", str(error)
        )
    assert seen and seen.group(1) == str(rootfs), "the refusal does not name the image"
    vm.stop()
    rootfs.symlink_to(setup.disk)
    Path(vsock).unlink(missing_ok=True)
    vm, console = begin()
    vm.load_snapshot(*saved)
    expect_state(lambda: get(vm.socket_path), "Paused")
    vm.update_drive("rootfs", str(shutil.copy(setup.disk, setup.scratch / "instance.ext4")))
    rootfs.unlink()
    vm.vsock_socket_path = vsock
    vm.setup_vsock_listener(9000)
    vm.resume()
    pid = vm.process.pid
    expect_gone_on(lambda: "".join(console), vm.socket_path, pid)
    vm.stop()
    return "drive (Async), entropy, network, vsock, limits; start, pause, resume, snapshot, another image, end"


def firecracker_python(setup):
    from firecracker.config import MicroVMConfig

    MicroVMConfig.data_path = str(setup.scratch)
    MicroVMConfig.binary_path = setup.firecracker
    MicroVMConfig.snapshot_path = str(setup.scratch / "snapshots")
    vm, folder, socket = firecracker_python_vm(setup, "abcd1234")
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
    # The client's connections stay open until Python collects what is left of them, and there may be ten.
    def request():
        gc.collect()
        return get(socket)

    for state, seen in [("Paused", "Paused"), ("Resumed", "Running")]:
        vm._vmm.update_vmm_state(vm._microvm_id, state)
        expect_state(request, seen)
    # It pauses the guest, and has it go on.
    vm.snapshot(action="create")
    expect_state(request, "Running")
    # A zombie lives on, for `stop`, so that none is to be.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    assert vm._process.stop(vm._microvm_id)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    shutil.rmtree(folder)
    saved = {"memory_path": vm._mem_file_path, "snapshot_path": vm._snapshot_path}
    # Its vsock gets the path that it had.
    folder.mkdir()
    vm, folder, socket = firecracker_python_vm(setup, "abcd1235")
    vm.snapshot(action="load", **saved)
    interface = get(socket, "/vm/config")["network-interfaces"][0]
    assert interface["host_dev_name"] == "tap_abcd1235", interface
    pid, _ = vm._process.get_pid(vm._microvm_id)
    log = folder / "firecracker.log"
    expect_gone_on(lambda: log.read_text(errors="replace"), socket, pid)
    return "drive, network, MMDS, vsock; start, pause, resume, snapshot, another TAP, SIGTERM"


def firecracker_python_vm(setup, name):
    """A guest of firecracker-python that is to be configured, its folder and its socket."""
    from firecracker.config import MicroVMConfig
    from firecracker.microvm import MicroVM
    from firecracker.process import ProcessManager
    from firecracker.vmm import VMMManager

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
    vm._microvm_id, vm._microvm_name = name, "one"
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
    snapshots = f"{vm._config.snapshot_path}/{name}"
    vm._mem_file_path, vm._snapshot_path = f"{snapshots}/memory", f"{snapshots}/snapshot"
    return vm, folder, socket


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
