//! How much of a file is examined, and reading numbers in it.

/// Bytes from the start of a file (or of unpacked data) that hold every header and section table
/// read here. The arm64 Image keeps its PE header in its first 4 KiB page
/// (arch/arm64/kernel/efi-header.S), the bzImage its setup header below 0x301.
pub const HEAD: usize = 4096;

/// The largest plausible kernel, in bytes from the load address to the end of its BSS.
///
/// Distributions' kernels need 25 to 60 MiB and a build with everything in it some hundreds, so
/// 1 GiB refuses nothing real, and bounds what a damaged header can make the VMM set aside.
pub const MAX_IMAGE_SIZE: u64 = 1 << 30;

fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes_at(bytes, at).map(u16::from_le_bytes)
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes_at(bytes, at).map(u32::from_le_bytes)
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes_at(bytes, at).map(u64::from_le_bytes)
}
