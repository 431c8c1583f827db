//! Files that users give: kernels, boards, disk images.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use armlet::boards::BUILT_IN;
use armlet::kernel::Kernel;
use armlet::virtio::disk::qcow2::header::Header;
use armlet::virtio::disk::qcow2::mend::survey;
use armlet_arch::aarch64::Aarch64;
use armlet_arch::board::{Architecture, Profile, Signature};
use armlet_arch::image::{HEAD, recognise};
use armlet_arch::x86_64::X86_64;
use armlet_arch::{Arch, Board, Request, plan};
use rustix::fs::{MemfdFlags, memfd_create};

use super::input::Input;

/// A file that is nowhere but here.
fn file(data: &[u8]) -> File {
    let file = memfd_create("armlet-fuzz", MemfdFlags::CLOEXEC);
    let mut file = File::from(file.expect("descriptors"));
    file.write_all(data).expect("memory");
    file
}

/// Kernels in all their forms, read and unpacked.
pub fn kernel(data: &[u8]) {
    /// More than any input should ask for.
    const MOST: u64 = 8 << 20;
    let head = &data[..data.len().min(HEAD)];
    let recognised = recognise(head);
    let file = file(data);
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let Ok(kernel) = Kernel::open(&path) else {
        return;
    };
    assert!(recognised.is_ok());
    assert!(!kernel.describe().is_empty());
    let _ = (kernel.header().arm64(), kernel.header().x86_64());
    let room = kernel.memory_size();
    assert!(room <= 2 << 30, "{room} bytes are no kernel's");
    let mut memory = vec![0xee; room.min(MOST) as usize];
    if let Ok(written) = kernel.load_into(&mut memory) {
        assert!(written <= memory.len() as u64);
        let again = vec![0x11; memory.len()];
        let mut again = again;
        let second = kernel.load_into(&mut again).expect("it did before");
        assert_eq!(written, second);
        let written = written as usize;
        assert_eq!(memory[..written], again[..written]);
        assert!(memory[written..].iter().all(|byte| *byte == 0xee));
    }
}

/// Board files, and plans of what they describe.
pub fn board(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else {
        return;
    };
    let _ = Signature::read(text);
    let parent = |_: &str, name: &str| {
        let known = BUILT_IN.iter().find(|board| board.name == name);
        let board = known.ok_or("there is no such board")?;
        Ok((board.name.to_owned(), board.text.to_owned()))
    };
    let Ok(profile) = Profile::read("board", text, &parent) else {
        return;
    };
    let shown = profile.show();
    let again = Board::parse(&shown);
    assert_eq!(again.as_ref(), Ok(&profile.board), "{shown}");
    match profile.board.arch {
        Architecture::Aarch64 => plan_of::<Aarch64>(&profile.board),
        Architecture::X86_64 => plan_of::<X86_64>(&profile.board),
    }
}

fn plan_of<A: Arch>(board: &Board) {
    let request = Request::<A> {
        cpus: board.guest.cpus,
        memory: board.guest.memory,
        width: board.guest.width,
        gic: board.guest.gic,
        kernel: None,
        initrd: None,
        cmdline: board.guest.cmdline.clone(),
        seeds: None,
        virtio: vec!["disk0".to_owned()],
        pmem: Vec::new(),
        wishes: Default::default(),
        topology: Default::default(),
    };
    match plan(board, &request, &A::assumed_host(board)) {
        Ok(plan) => {
            let regions = plan.layout.regions();
            for (index, region) in regions.iter().enumerate() {
                let overlaps = |other| region.range.overlaps(other);
                let mut others = regions[..index].iter();
                assert!(!others.any(|other| overlaps(other.range)), "{regions:?}");
            }
        }
        Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
    }
}

/// qcow2 images whose last user was killed, or that are none.
pub fn qcow2(data: &[u8]) {
    let mut input = Input::new(data);
    let cluster_bits = match input.u8() {
        choice @ 0..=239 => u32::from(choice % 8) + 9,
        _ => input.number(),
    };
    let cluster = 1_u64 << cluster_bits.min(16);
    let mut header = vec![0; 104];
    let words = [
        (0, 0x5146_49fb),
        (4, if input.rarely(16) { input.u32() } else { 3 }),
        (20, cluster_bits),
        (36, input.number() & 0xffff),
        (56, u32::from(input.u8() & 3)),
        (76, if input.rarely(16) { input.u32() } else { 0 }),
        (96, u32::from(input.u8() & 7)),
    ];
    for (at, word) in words {
        header[at..at + 4].copy_from_slice(&word.to_be_bytes());
    }
    for at in [40, 48] {
        let offset = match input.rarely(16) {
            true => input.u64(),
            false => u64::from(input.u8() & 7) * cluster,
        };
        header[at..at + 8].copy_from_slice(&offset.to_be_bytes());
    }
    // One that is in order so far: tables, and a block of counts that counts nothing yet.
    let is_sound = input.flag();
    if is_sound {
        header[4..8].copy_from_slice(&3_u32.to_be_bytes());
        header[36..40].copy_from_slice(&2_u32.to_be_bytes());
        header[40..48].copy_from_slice(&cluster.to_be_bytes());
        header[48..56].copy_from_slice(&(2 * cluster).to_be_bytes());
        header[56..60].copy_from_slice(&1_u32.to_be_bytes());
        header[76..80].fill(0);
    }
    let image = file(&header);
    for (table, entry) in [(2, 3), (1, 4)].into_iter().filter(|_| is_sound) {
        let entry: u64 = entry * cluster;
        let written = image.write_all_at(&entry.to_be_bytes(), table * cluster);
        written.expect("memory");
    }
    // Entries of tables, of which one leads to another.
    let mut left = 200;
    while !input.is_empty() && left > 0 {
        left -= 1;
        // The table that leads to data, more often than not.
        let table = match input.u8() {
            choice @ 0..=127 => choice & 15,
            _ => 4,
        };
        let at = u64::from(table) * cluster;
        let index = u64::from(input.u8()) * 8 % cluster;
        let flags = u64::from(input.u8()) << 56;
        let entry = match input.u8() {
            choice @ 0..=223 => flags | (u64::from(choice & 15) * cluster),
            224..=239 => flags | u64::from(input.u32()),
            _ => input.u64(),
        };
        let written = image.write_all_at(&entry.to_be_bytes(), at + index);
        written.expect("memory");
    }
    let size = image.metadata().expect("a file").len();
    if let Ok(header) = Header::read(&image)
        && let Ok(repair) = survey(&image, &header)
        && repair.apply(&image, &header).is_ok()
    {
        let again = survey(&image, &header).expect("it was good");
        assert_eq!(again.count(), 0, "it is not mended at once");
    }
    let now = image.metadata().expect("a file").len();
    assert!(now <= size.next_multiple_of(1 << 21), "it grew to {now}");
}
