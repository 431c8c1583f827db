//! `armlet api`: the command line of Firecracker.

use argh::FromArgs;

/// Serve Firecracker's API at a Unix socket: programs that drive microVMs by it configure and start one
/// guest. With the command line of Firecracker; it is the same when this program is started under the
/// name 'firecracker'.
#[derive(FromArgs, Debug, Default)]
#[argh(
    subcommand,
    name = "api",
    example = "A guest that curl configures and starts:
  {command_name} --api-sock /tmp/fc.sock &
  curl --unix-socket /tmp/fc.sock -X PUT http://localhost/boot-source \\
    -d '{{\"kernel_image_path\": \"Image\", \"boot_args\": \"console=ttyS0\"}}'
  curl --unix-socket /tmp/fc.sock -X PUT http://localhost/actions \\
    -d '{{\"action_type\": \"InstanceStart\"}}'

A guest that a file describes, without a socket:
  {command_name} --no-api --config-file vm.json",
    note = "The exit status is 0 when the guest ended, 153 for arguments that are wrong, and 1 for other errors. A signal ends it at once. The socket is not removed."
)]
pub struct ApiArgs {
    /// the socket, at which nothing may be (default: /run/firecracker.socket)
    #[argh(option, arg_name = "PATH")]
    pub api_sock: Option<String>,
    /// the machine's name: 1 to 64 letters, digits and '-' (default: anonymous-instance)
    #[argh(option, arg_name = "ID")]
    pub id: Option<String>,
    /// a JSON file with all that requests would configure; the guest starts at once
    #[argh(option, arg_name = "FILE")]
    pub config_file: Option<String>,
    /// serve no API; needs --config-file
    #[argh(switch)]
    pub no_api: bool,
    /// a JSON file with the guest's metadata
    #[argh(option, arg_name = "FILE")]
    pub metadata: Option<String>,
    /// the most bytes of metadata (default: that of requests)
    #[argh(option, arg_name = "BYTES")]
    pub mmds_size_limit: Option<String>,
    /// the most bytes of a request (default: 51200)
    #[argh(option, arg_name = "BYTES")]
    pub http_api_max_payload_size: Option<String>,
    /// where messages go, in place of standard output: a file or FIFO
    #[argh(option, arg_name = "PATH")]
    pub log_path: Option<String>,
    /// which messages: Off, Error, Warn, Info (default), Debug or Trace
    #[argh(option, arg_name = "LEVEL")]
    pub level: Option<String>,
    /// taken, without effect
    #[argh(option, arg_name = "MODULE")]
    pub module: Option<String>,
    /// write a message's level, where --log-path is given
    #[argh(switch)]
    pub show_level: bool,
    /// taken, without effect
    #[argh(switch)]
    pub show_log_origin: bool,
    /// where metrics go: a file or FIFO
    #[argh(option, arg_name = "PATH")]
    pub metrics_path: Option<String>,
    /// taken, without effect: --sandbox is what confines armlet
    #[argh(switch)]
    pub no_seccomp: bool,
    /// taken, without effect: filters are part of the program
    #[argh(option, arg_name = "FILE")]
    pub seccomp_filter: Option<String>,
    /// taken, without effect: devices are on MMIO
    #[argh(switch)]
    pub enable_pci: bool,
    /// taken, without effect
    #[argh(switch)]
    pub boot_timer: bool,
    /// taken, without effect: when the jailer was started
    #[argh(option, arg_name = "US")]
    pub start_time_us: Option<String>,
    /// taken, without effect
    #[argh(option, arg_name = "US")]
    pub start_time_cpu_us: Option<String>,
    /// taken, without effect
    #[argh(option, arg_name = "US")]
    pub parent_cpu_time_us: Option<String>,
    /// the board (default: firecracker, or pc on an x86_64 host)
    #[argh(option, arg_name = "NAME|PATH")]
    pub board: Option<String>,
    /// as of 'run'
    #[argh(option, arg_name = "on|strict|log|off")]
    pub sandbox: Option<String>,
    /// print the version of the format of snapshots and leave
    #[argh(switch)]
    pub snapshot_version: bool,
    /// print that of a snapshot's state and leave
    #[argh(option, arg_name = "FILE")]
    pub describe_snapshot: Option<String>,
    /// print the version and leave
    #[argh(switch)]
    pub version: bool,
}
