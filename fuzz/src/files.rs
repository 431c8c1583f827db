//! Files that users give: kernels, boards, disk images.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use armlet::boards::BUILT_IN;
use armlet::kernel::Kernel;
use armlet_arch::Architecture;
use armlet_arch::aarch64::Aarch64;
use armlet_arch::board::{Profile, Signature};
use armlet_arch::image::{HEAD, recognise};
use armlet_arch::switch::Switch;
use armlet_arch::x86_64::X86_64;
use armlet_arch::{Arch, Board, Request, plan};
use rustix::fs::{MemfdFlags, memfd_create};

/// A file that is nowhere but here.
pub fn file(data: &[u8]) -> File {
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
    // A crash of the process that unpacks would pass for damaged data.
    let sound = |error: &dyn std::fmt::Display| {
        let text = format!("{error:#}");
        assert!(
            !text.contains("the process that unpacks it failed"),
            "{text}"
        );
    };
    let kernel = match Kernel::open(&path) {
        Ok(kernel) => kernel,
        Err(error) => return sound(&error),
    };
    assert!(recognised.is_ok());
    assert!(!kernel.describe().is_empty());
    let _ = (kernel.header().arm64(), kernel.header().x86_64());
    let room = kernel.memory_size();
    assert!(room <= 2 << 30, "{room} bytes are no kernel's");
    let mut memory = vec![0xee; room.min(MOST) as usize];
    let written = kernel
        .load_into(&mut memory)
        .inspect_err(|error| sound(error));
    if let Ok(written) = written {
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
        width: board.guest.width,
        gic: board.guest.gic,
        cmdline: board.guest.cmdline.clone(),
        virtio: vec!["disk0".to_owned()],
        vmgenid: board.guest.vmgenid == Switch::On,
        ..Request::new(board.guest.cpus, board.guest.memory)
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
