//! qcow2 images: hostile ones, and some that are in order so far, read and written.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use armlet_backends::disk::qcow2::Anonymous;
use armlet_backends::disk::qcow2::header::Header;
use armlet_backends::disk::qcow2::mend::survey;
use armlet_devices::virtio::block::{Data, Operation, Request};
use armlet_devices::virtio::queue::Segment;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::files::file;
use super::input::Input;

/// Bytes of an input that say what the features are, and what is done.
const TAIL: usize = 64;
/// Bytes of a disk that are looked at.
const DISK: usize = 256 << 10;
/// Where guest memory begins.
const BASE: GuestAddress = GuestAddress(1 << 20);

/// Makes an image, has it mended, and works on it.
pub fn qcow2(data: &[u8]) {
    let (data, tail) = data.split_at(data.len() - TAIL.min(data.len() / 2));
    let mut choices = Input::new(tail);
    let (image, cluster) = make(&mut Input::new(data), &mut choices);
    let size = image.metadata().expect("a file").len();
    let before = contents(&image);
    let readonly = choices.flag();
    if let Ok(header) = Header::read(&image) {
        let repair = survey(&image, &header);
        assert!(contents(&image) == before, "nothing is written yet");
        if let Ok(repair) = repair
            && !readonly
            && repair.apply(&image, &header).is_ok()
        {
            let again = Header::read(&image).expect("it was good");
            let again = survey(&image, &again).expect("it was good");
            assert_eq!(again.count(), 0, "it is not mended at once");
            let now = image.metadata().expect("a file").len();
            assert!(now <= size.next_multiple_of(1 << 21), "it grew to {now}");
        }
    }
    work(&image, readonly, &mut choices);
    let most = size + (64 << 10) + 64 * cluster;
    let now = image.metadata().expect("a file").len();
    assert!(now <= most.next_multiple_of(4 << 20), "it grew to {now}");
}

fn contents(image: &File) -> Vec<u8> {
    let len = image.metadata().expect("a file").len().min(1 << 20);
    let mut bytes = vec![0; len as usize];
    image.read_exact_at(&mut bytes, 0).expect("memory");
    bytes
}

/// Makes an image; returns the bytes of its clusters, too.
fn make(input: &mut Input<'_>, choices: &mut Input<'_>) -> (File, u64) {
    let cluster_bits = match input.u8() {
        choice @ 0..=239 => u32::from(choice % 8) + 9,
        _ => input.number(),
    };
    let cluster = 1_u64 << cluster_bits.min(16);
    let mut header = vec![0; 128];
    let words = [
        (0, 0x5146_49fb),
        (4, if input.rarely(16) { input.u32() } else { 3 }),
        (20, cluster_bits),
        (36, input.number() & 0xffff),
        (56, u32::from(input.u8() & 3)),
        (76, if input.rarely(16) { input.u32() } else { 0 }),
        (96, u32::from(input.u8() & 7)),
        (100, 112),
    ];
    let put = |header: &mut Vec<u8>, at: usize, bytes: &[u8]| {
        header[at..at + bytes.len()].copy_from_slice(bytes);
    };
    for (at, word) in words {
        put(&mut header, at, &word.to_be_bytes());
    }
    for at in [40, 48] {
        let offset = match input.rarely(16) {
            true => input.u64(),
            false => u64::from(input.u8() & 7) * cluster,
        };
        put(&mut header, at, &offset.to_be_bytes());
    }
    // One that is in order so far: tables, and a block of counts that counts nothing yet.
    let is_sound = input.flag();
    if is_sound {
        put(&mut header, 4, &3_u32.to_be_bytes());
        put(&mut header, 36, &2_u32.to_be_bytes());
        put(&mut header, 40, &cluster.to_be_bytes());
        put(&mut header, 48, &(2 * cluster).to_be_bytes());
        put(&mut header, 56, &1_u32.to_be_bytes());
        put(&mut header, 76, &[0; 4]);
    }
    let disk = match choices.rarely(32) {
        true => choices.u64(),
        false => 512 * u64::from(choices.u16() % 600),
    };
    put(&mut header, 24, &disk.to_be_bytes());
    // Dirty, corrupt, external data, zstd, extended L2, and others.
    let features = choices.u8();
    if choices.rarely(4) {
        header[79] |= features;
        header[104] = features >> 3 & 1;
    }
    if choices.rarely(8) {
        header[35] = choices.u8() % 4;
        header[63] = choices.u8() % 4;
    }
    if choices.rarely(8) {
        put(&mut header, 88, &choices.u64().to_be_bytes());
        put(&mut header, 112, &0x2385_2875_u32.to_be_bytes());
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
    if is_sound && choices.rarely(2) {
        image.set_len(24 * cluster).expect("memory");
    }
    (image, cluster)
}

/// Does what a guest may ask for; what it wrote it reads.
fn work(image: &File, readonly: bool, choices: &mut Input<'_>) {
    thread_local! {
        static MEMORY: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(BASE, DISK)]).expect("memory");
    }
    let file = image.try_clone().expect("descriptors");
    let Ok(disk) = Anonymous::open(file, readonly) else {
        return;
    };
    let size = disk.size().min(DISK as u64) as usize;
    MEMORY.with(|memory| {
        let run = |operation, offset: usize, len: usize| {
            let segments = [Segment { address: BASE, len }];
            let is_data = matches!(operation, Operation::Read | Operation::Write);
            let result = disk.perform(
                memory,
                &Request {
                    tag: 0,
                    operation,
                    offset: offset as u64,
                    len: len as u64,
                    data: match is_data {
                        true => Data::new(&segments, 0, len),
                        false => Data::new(&[], 0, 0),
                    },
                    durable: false,
                    cancelled: &Arc::default(),
                },
            );
            result.is_ok()
        };
        let mut known: Vec<Option<u8>> = vec![None; size];
        let sectors = size / 512;
        while !choices.is_empty() && sectors > 0 {
            let what = choices.u8();
            let first = usize::from(choices.u8()) * sectors / 256;
            let count = (1 + usize::from(choices.u8() % 40)).min(sectors - first);
            let range = first * 512..(first + count) * 512;
            let (operation, after) = match what % 6 {
                0 | 1 => (Operation::Write, Some(what)),
                2 => (Operation::WriteZeroes { unmap: true }, Some(0)),
                3 => (Operation::WriteZeroes { unmap: false }, Some(0)),
                4 => (Operation::Discard, None),
                _ => {
                    run(Operation::Flush, 0, 0);
                    continue;
                }
            };
            let bytes = vec![what; range.len()];
            memory.write_slice(&bytes, BASE).expect("memory");
            let done = run(operation, range.start, range.len());
            assert!(
                !(readonly && done && operation == Operation::Write),
                "it is only read"
            );
            known[range].fill(after.filter(|_| done));
        }
        for (sector, known) in known.chunks(512).enumerate() {
            if run(Operation::Read, sector * 512, known.len()) {
                let mut bytes = vec![0; known.len()];
                memory.read_slice(&mut bytes, BASE).expect("memory");
                let differs =
                    |(byte, known): (&u8, &Option<u8>)| known.is_some_and(|known| known != *byte);
                assert!(
                    !bytes.iter().zip(known).any(differs),
                    "sector {sector} is another"
                );
            } else {
                assert!(known.iter().all(Option::is_none), "sector {sector} is lost");
            }
        }
        run(Operation::Flush, 0, 0);
    });
}
