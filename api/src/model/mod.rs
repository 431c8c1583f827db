//! The bodies of requests and answers. Their fields are Firecracker's (its `firecracker.yaml`).

mod devices;
mod machine;

pub use devices::{
    Balloon, BalloonHint, BalloonPatch, BalloonStatistics, CacheType, Drive, DrivePatch, Entropy,
    HintStart, HotplugMemory, HotplugPatch, IoEngine, Limits, Mac, MmdsConfig, MmdsVersion,
    NetPatch, NetworkInterface, Pmem, PmemPatch, Serial, TokenBucket, Vsock,
};
pub use machine::{
    Action, ActionType, BackendType, BootSource, CpuConfig, CpuTemplate, HugePages, Level, Logger,
    MachineConfig, MachineConfigUpdate, MemoryBackend, Metrics, NetworkOverride, SnapshotCreate,
    SnapshotLoad, SnapshotType, VmPatch, VmState, VsockOverride,
};
