//! Images as a guest's memory, and what becomes of them meanwhile.

use super::*;
use crate::pages;
use std::fs;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use tempfile::TempDir;
use vm_memory::GuestAddress;

struct Folder(TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().expect("a folder"))
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_string_lossy().into_owned()
    }

    fn image(&self, size: u64) -> String {
        let path = self.path("image");
        let file = File::create(&path).expect("a file");
        file.set_len(size).expect("room");
        path
    }
}

fn open(text: &str, index: usize) -> Result<PmemImage> {
    PmemImage::open(&PmemOptions::parse(text)?, index)
}

fn refused(text: &str) -> String {
    let error = open(text, 0).map(|_| ()).expect_err(text);
    format!("{error:#}")
}

#[test]
fn an_image_is_mapped_whole() {
    let folder = Folder::new();
    let path = folder.image(4 << 20);
    let image = open(&format!("path={path}"), 3).expect("an image");
    assert_eq!((image.size(), image.is_readonly()), (4 << 20, false));
    assert!((image.address() as u64).is_multiple_of(ALIGN) && image.address() != 0);
    assert_eq!(Backend::name(&image), "pmem3");
    image.place(0x1_0000_0000);
    let device = image.device().expect("a device");
    let config = device.lock().expect("sound").config();
    let mut bytes = [0; 16];
    config.read(0, &mut bytes);
    assert_eq!(bytes[..8], 0x1_0000_0000_u64.to_le_bytes());
    assert_eq!(bytes[8..], (4_u64 << 20).to_le_bytes());
}

#[test]
fn only_one_writes_an_image() {
    let folder = Folder::new();
    let path = folder.image(2 << 20);
    let first = open(&format!("path={path}"), 0).expect("an image");
    assert!(refused(&format!("path={path}")).contains("is in use by another program"));
    assert!(refused(&format!("path={path},readonly")).contains("is in use"));
    // Not even when it is dropped: the mapping stays, and the lock with it.
    drop(first);
    assert!(refused(&format!("path={path}")).contains("is in use"));
    let folder = Folder::new();
    let path = folder.image(2 << 20);
    for index in [0, 1] {
        let reader = open(&format!("path={path},readonly"), index);
        assert!(reader.expect("readers share").is_readonly());
    }
    assert!(refused(&format!("path={path}")).contains("is in use"));
}

#[test]
fn what_is_wrong_is_said_with_what_would_work() {
    let folder = Folder::new();
    let missing = folder.path("missing");
    assert!(refused("readonly").contains("lacks path="));
    assert!(refused(&format!("path={missing}")).contains("No such file"));
    let directory = folder.path("directory");
    fs::create_dir(&directory).expect("a folder");
    for switch in ["", ",readonly"] {
        assert!(refused(&format!("path={directory}{switch}")).contains("directory"));
    }
    for (size, advice) in [(0, "-s 2M"), (1, "-s 2M"), ((4 << 20) + 512, "-s 6M")] {
        let path = folder.image(size);
        let error = refused(&format!("path={path}"));
        assert!(
            error.contains(advice) && error.contains("multiple of 2 MiB"),
            "{error}"
        );
    }
    assert!(refused("path=/dev/null").contains("neither a file nor a block device"));
    assert!(refused("path=a,size=3").contains("use path, readonly"));
}

#[test]
fn what_is_advised_can_be_followed_whatever_the_path() {
    let folder = Folder::new();
    for name in ["a b", "it's $HOME", "say \"hi\"", "grün"] {
        let path = folder.path(name);
        fs::write(&path, b"short").expect("a file");
        let error = refused(&format!("path={path}"));
        let (_, advice) = error.split_once("'truncate ").expect("advice");
        let (command, _) = advice.rsplit_once("' makes it one").expect("its end");
        let done = std::process::Command::new("sh")
            .args(["-c", &format!("truncate {command}")])
            .status();
        assert!(done.expect("a shell").success(), "{error}");
        open(&format!("path={path}"), 0).expect("an image now");
    }
}

#[test]
fn a_flush_of_an_image_that_was_cut_fails() {
    let folder = Folder::new();
    let path = folder.image(4 << 20);
    let image = open(&format!("path={path}"), 0).expect("an image");
    image.image.flush().expect("nothing is wrong");
    let file = File::options().write(true).open(&path).expect("a file");
    file.set_len(2 << 20).expect("it is cut");
    let error = image.image.flush().expect_err("half of it is gone");
    assert!(error.to_string().contains("cut to 2097152 bytes"));
    file.set_len(4 << 20).expect("room");
    image.image.flush().expect("nothing was lost");
    image.image.lost.store(true, Ordering::Relaxed);
    assert!(image.image.flush().is_err());
}

#[test]
fn memory_takes_the_place_of_what_was_cut_off() {
    let folder = Folder::new();
    let path = folder.path("image");
    fs::write(&path, vec![7; 4 << 20]).expect("a file");
    let image = open(&format!("path={path}"), 0).expect("an image");
    let memory = image.memory();
    let (mut first, mut second) = (0, 0);
    assert!(
        !memory.detach_missing(Missing::End, &mut first),
        "all there"
    );
    let file = File::options().write(true).open(&path).expect("a file");
    // In the middle of a page, of which the rest reads as zero.
    file.set_len((3 << 20) - 100).expect("it is cut");
    assert!(memory.detach_missing(Missing::End, &mut first));
    assert!(
        memory.detach_missing(Missing::End, &mut second),
        "another saw it too"
    );
    for seen in [&mut first, &mut second] {
        assert!(
            !memory.detach_missing(Missing::End, seen),
            "it is another's fault"
        );
    }
    let mut data = vec![1; 4 << 20];
    let all = File::open("/proc/self/mem").expect("our memory");
    all.read_exact_at(&mut data, image.address() as u64)
        .expect("no fault");
    let wanted = |at: usize| if at < (3 << 20) - 100 { 7 } else { 0 };
    assert!(
        data.iter()
            .enumerate()
            .all(|(at, byte)| *byte == wanted(at))
    );
    file.set_len(4 << 20).expect("room");
    let error = memory
        .flush()
        .expect_err("what was written there is nowhere");
    assert!(error.to_string().contains("lost before"));
}

/// A mapping whose file was cut, as devices have it.
#[test]
fn devices_survive_what_was_cut_off() {
    use vm_memory::{Bytes, GuestMemoryMmap};
    let folder = Folder::new();
    let path = folder.path("image");
    fs::write(&path, vec![7; 4 << 20]).expect("a file");
    let image = open(&format!("path={path}"), 0).expect("an image");
    let start = GuestAddress(0x1_0000_0000);
    let region = image.region(start).expect("a region");
    let memory = GuestMemoryMmap::from_regions(vec![region]).expect("memory");
    let at = |offset: u64| GuestAddress(start.0 + offset);
    memory.write_slice(&[1; 512], at(512)).expect("memory");
    image.image.flush().expect("nothing is wrong");
    assert_eq!(fs::read(&path).expect("a file")[512..1024], [1; 512]);
    let file = File::options().write(true).open(&path).expect("a file");
    file.set_len(2 << 20).expect("it is cut");
    memory.write_slice(&[2; 512], at(3 << 20)).expect("memory");
    let mut data = [1; 1024];
    memory.read_slice(&mut data, at(3 << 20)).expect("memory");
    assert_eq!(data, [[2; 512], [0; 512]].concat()[..], "until it is gone");
    // Where the file still is nothing changed.
    memory.read_slice(&mut data, at(2048)).expect("memory");
    assert_eq!(data, [7; 1024]);
    assert!(image.image.flush().is_err());
    file.set_len(4 << 20).expect("room");
    assert!(image.image.flush().is_err(), "what was written is nowhere");
    let size = file.metadata().expect("a size").len();
    assert_eq!(size, 4 << 20);
}

#[test]
fn devices_only_read_what_is_for_reading() {
    let folder = Folder::new();
    let path = folder.image(2 << 20);
    let image = open(&format!("path={path},readonly"), 0).expect("an image");
    let region = image.region(GuestAddress(0)).expect("a region");
    assert_eq!(region.prot(), libc::PROT_READ);
    assert!(pages::is_persistent(&region));
}

#[test]
fn holes_that_the_host_has_room_for_stay_the_files() {
    let folder = Folder::new();
    let path = folder.image(4 << 20);
    let image = open(&format!("path={path}"), 0).expect("an image");
    assert!(!image.memory().detach_missing(Missing::Blocks, &mut 0));
    image.image.flush().expect("nothing was lost");
}
