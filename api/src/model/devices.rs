//! Devices.

use serde::{Deserialize, Deserializer, Serialize};
use std::fmt;
use std::net::Ipv4Addr;

/// A token bucket. Fields that are not known are none of its business.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenBucket {
    /// Bytes or operations that it holds.
    pub size: u64,
    /// What it holds besides, once.
    #[serde(default)]
    pub one_time_burst: Option<u64>,
    /// Milliseconds until it is full again.
    pub refill_time: u64,
}

impl TokenBucket {
    /// Whether it limits anything.
    #[must_use]
    pub fn limits(&self) -> bool {
        self.size > 0 && self.refill_time > 0
    }
}

/// What limits a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Bytes.
    #[serde(default)]
    pub bandwidth: Option<TokenBucket>,
    /// Operations.
    #[serde(default)]
    pub ops: Option<TokenBucket>,
}

impl Limits {
    /// What of it limits anything, if something does.
    #[must_use]
    pub fn in_force(limits: Option<Limits>) -> Option<Limits> {
        let limits = limits?;
        let limits = Limits {
            bandwidth: limits.bandwidth.filter(TokenBucket::limits),
            ops: limits.ops.filter(TokenBucket::limits),
        };
        (limits != Limits::default()).then_some(limits)
    }
}

/// `/drives/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Its ID.
    pub drive_id: String,
    /// The partition that has the root file system.
    #[serde(default)]
    pub partuuid: Option<String>,
    /// Whether it has the root file system.
    pub is_root_device: bool,
    /// Whether flushes reach the image.
    #[serde(default)]
    pub cache_type: CacheType,
    /// Whether the guest only reads it.
    #[serde(default, deserialize_with = "or_default")]
    pub is_read_only: bool,
    /// The image.
    #[serde(default)]
    pub path_on_host: Option<String>,
    /// Its limits.
    #[serde(default)]
    pub rate_limiter: Option<Limits>,
    /// How the host does its I/O.
    #[serde(default, deserialize_with = "or_default")]
    pub io_engine: IoEngine,
    /// The socket of a process that is the disk.
    #[serde(default)]
    pub socket: Option<String>,
}

/// Reads `null` as if nothing was there.
fn or_default<'de, T: Default + Deserialize<'de>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Whether flushes reach the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// They do not.
    #[default]
    Unsafe,
    /// They do.
    Writeback,
}

/// How the host does I/O.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    /// By io_uring.
    Async,
    /// One call at a time.
    #[default]
    Sync,
}

/// `PATCH /drives/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrivePatch {
    /// Its ID.
    pub drive_id: String,
    /// Another image.
    #[serde(default)]
    pub path_on_host: Option<String>,
    /// Other limits.
    #[serde(default)]
    pub rate_limiter: Option<Limits>,
}

/// A MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Reads six pairs of digits with colons between them.
    #[must_use]
    pub fn parse(text: &str) -> Option<Mac> {
        let mut bytes = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut bytes {
            let pair = pairs.next()?;
            let is_pair = pair.len() == 2 && pair.bytes().all(|byte| byte.is_ascii_hexdigit());
            *byte = is_pair.then(|| u8::from_str_radix(pair, 16).ok())??;
        }
        pairs.next().is_none().then_some(Mac(bytes))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl Serialize for Mac {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Mac, D::Error> {
        let text = String::deserialize(deserializer)?;
        Mac::parse(&text)
            .ok_or_else(|| serde::de::Error::custom("The provided MAC address is invalid."))
    }
}

/// `/network-interfaces/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Its ID.
    pub iface_id: String,
    /// The TAP.
    pub host_dev_name: String,
    /// The guest's MAC address.
    #[serde(default)]
    pub guest_mac: Option<Mac>,
    /// The largest packet that the guest sends.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// What limits what the guest receives.
    #[serde(default)]
    pub rx_rate_limiter: Option<Limits>,
    /// What limits what it sends.
    #[serde(default)]
    pub tx_rate_limiter: Option<Limits>,
}

/// `PATCH /network-interfaces/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetPatch {
    /// Its ID.
    pub iface_id: String,
    /// What limits what the guest receives.
    #[serde(default)]
    pub rx_rate_limiter: Option<Limits>,
    /// What limits what it sends.
    #[serde(default)]
    pub tx_rate_limiter: Option<Limits>,
}

/// `/vsock`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// It will go away.
    #[serde(default, skip_serializing)]
    pub vsock_id: Option<String>,
    /// The guest's context ID.
    pub guest_cid: u32,
    /// Where the host's programs connect.
    pub uds_path: String,
}

/// `/balloon`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// Its target in MiB.
    pub amount_mib: u32,
    /// Whether the guest takes memory back before it kills a process.
    pub deflate_on_oom: bool,
    /// How often the guest is asked for statistics, in seconds; never for 0.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// Whether the guest can be asked for free pages.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// Whether the guest reports them by itself.
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// `PATCH /balloon`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonPatch {
    /// Its target in MiB.
    pub amount_mib: u32,
}

/// `PATCH /balloon/statistics`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatistics {
    /// How often the guest is asked, in seconds.
    pub stats_polling_interval_s: u16,
}

/// `PATCH /balloon/hinting/start`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HintStart {
    /// Whether the guest is told that the hints were used, once it has given all.
    #[serde(default = "yes")]
    pub acknowledge_on_stop: bool,
}

impl Default for HintStart {
    fn default() -> HintStart {
        HintStart {
            acknowledge_on_stop: true,
        }
    }
}

fn yes() -> bool {
    true
}

/// What the guest is asked of its free pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BalloonHint {
    /// To tell of them; and whether it is told at the end that it may stop.
    Start(bool),
    /// To stop.
    Stop,
}

/// `/entropy`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    /// Its limits.
    #[serde(default)]
    pub rate_limiter: Option<Limits>,
}

/// `/serial`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// Where the output goes.
    #[serde(default)]
    pub serial_out_path: Option<String>,
    /// What limits it.
    #[serde(default)]
    pub rate_limiter: Option<TokenBucket>,
}

/// `/pmem/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pmem {
    /// Its ID.
    pub id: String,
    /// The image.
    pub path_on_host: String,
    /// Whether it has the root file system.
    #[serde(default)]
    pub root_device: bool,
    /// Whether the guest only reads it.
    #[serde(default)]
    pub read_only: bool,
    /// Its limits.
    #[serde(default)]
    pub rate_limiter: Option<Limits>,
}

/// `PATCH /pmem/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemPatch {
    /// Its ID.
    pub id: String,
    /// Other limits.
    #[serde(default)]
    pub rate_limiter: Option<Limits>,
}

/// `/hotplug/memory`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HotplugMemory {
    /// The most that can be plugged, in MiB.
    pub total_size_mib: u32,
    /// The least that can be plugged.
    #[serde(default = "least_block")]
    pub block_size_mib: u32,
    /// What a memslot holds.
    #[serde(default = "least_slot")]
    pub slot_size_mib: u32,
}

fn least_block() -> u32 {
    2
}

fn least_slot() -> u32 {
    128
}

impl HotplugMemory {
    /// What is wrong with its sizes.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        let (block, slot, total) = (self.block_size_mib, self.slot_size_mib, self.total_size_mib);
        Some(if block < least_block() {
            format!("Block size must not be lower than {} MiB", least_block())
        } else if !block.is_power_of_two() {
            "Block size must be a power of 2".to_owned()
        } else if slot < least_slot() {
            format!("Slot size must not be lower than {} MiB", least_slot())
        } else if !slot.is_multiple_of(block) {
            format!("Slot size must be a multiple of block size ({block} MiB)")
        } else if total < slot {
            format!("Total size must not be lower than slot size ({slot} MiB)")
        } else if !total.is_multiple_of(slot) {
            format!("Total size must be a multiple of slot size ({slot} MiB)")
        } else {
            return None;
        })
    }
}

/// `PATCH /hotplug/memory`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HotplugPatch {
    /// What is to be plugged, in MiB.
    pub requested_size_mib: u32,
}

/// `/mmds/config`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    /// Whether the guest needs a token.
    #[serde(default)]
    pub version: MmdsVersion,
    /// The interfaces at which the data are offered.
    pub network_interfaces: Vec<String>,
    /// The address that they are offered at.
    #[serde(default = "mmds_address", deserialize_with = "or_mmds_address")]
    pub ipv4_address: Ipv4Addr,
    /// Whether answers are as those of EC2's service.
    #[serde(default)]
    pub imds_compat: bool,
}

fn mmds_address() -> Ipv4Addr {
    Ipv4Addr::new(169, 254, 169, 254)
}

fn or_mmds_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Ipv4Addr, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_else(mmds_address))
}

/// Whether the guest needs a token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MmdsVersion {
    /// It does not.
    #[default]
    V1,
    /// It does.
    V2,
}
