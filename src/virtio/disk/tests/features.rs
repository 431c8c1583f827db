//! qcow2 images of every kind that QEMU makes, and hostile ones.

use super::*;
use std::process::{Command, Output};

/// The bytes of a cluster here.
const CLUSTER: u64 = 64 << 10;

/// A header of version 3, without extensions, with tables at clusters 1 (reference counts) and 2
/// (L1), and these numbers in it: where, how many bytes, which.
fn header(numbers: &[(usize, usize, u64)]) -> Vec<u8> {
    let mut header = vec![0; 112];
    let usual = [
        (0, 4, 0x5146_49fb),
        (4, 4, 3),
        (20, 4, 16),
        (24, 8, 1 << 20),
        (36, 4, 1),
        (40, 8, 2 * CLUSTER),
        (48, 8, CLUSTER),
        (56, 4, 1),
        (96, 4, 4),
        (100, 4, 104),
    ];
    for (at, bytes, number) in usual.iter().chain(numbers) {
        header[*at..at + bytes].copy_from_slice(&number.to_be_bytes()[8 - bytes..]);
    }
    header
}

#[test]
fn a_size_beyond_what_the_tables_cover_is_refused() {
    let folder = Folder::new();
    // Once memory for each 32 KiB of the disk was asked for: 32 GiB.
    let mut bytes = header(&[(20, 4, 9), (24, 8, 1 << 50), (40, 8, 1024), (48, 8, 512)]);
    bytes.resize(2048, 0);
    let image = folder.with("large.qcow2", &bytes);
    for readonly in ["", ",readonly"] {
        let message = fails(&format!("{image},format=qcow2{readonly}"));
        assert!(
            message.contains("has 1125899906842624 bytes, and its L1 table covers 32768"),
            "{message}"
        );
    }
}

#[test]
fn tables_behind_the_end_of_the_file_are_refused() {
    let folder = Folder::new();
    let far = 1 << 40;
    for (what, numbers) in [
        ("its L1 table has 8 bytes", [(40, 8, far)]),
        (
            "its table of reference counts has 65536 bytes",
            [(48, 8, far)],
        ),
        ("its L1 table has 33554432 bytes", [(36, 4, 4 << 20)]),
        (
            "its table of reference counts has 8388608 bytes",
            [(56, 4, 128)],
        ),
        ("its table of snapshots has 80 bytes", [(60, 4, 2)]),
        ("its tables are too large", [(36, 4, 5 << 20)]),
    ] {
        let mut bytes = header(&numbers);
        if what.contains("snapshots") {
            bytes[64..72].copy_from_slice(&far.to_be_bytes());
        }
        bytes.resize(3 * CLUSTER as usize, 0);
        let image = folder.with("far.qcow2", &bytes);
        for readonly in ["", ",readonly"] {
            let message = fails(&format!("{image},format=qcow2{readonly}"));
            assert!(message.contains(what), "{what}: {message}");
        }
    }
}

#[test]
fn entries_that_point_behind_the_end_of_the_file_are_refused() {
    // Once each was read for, as zeros: minutes.
    let entries = 80_000_u64;
    let mut bytes = header(&[(24, 8, entries << 29), (36, 4, entries)]);
    bytes.resize(2 * CLUSTER as usize, 0);
    for index in 0..entries {
        let entry = (1 << 63) | ((1 << 32) + index * CLUSTER);
        bytes.extend(u64::to_be_bytes(entry));
    }
    let folder = Folder::new();
    let image = folder.with("far.qcow2", &bytes);
    let message = fails(&format!("{image},format=qcow2"));
    assert!(
        message.contains("points behind its end, to byte 4294967296"),
        "{message}"
    );
    // What is advised does help.
    assert!(message.contains("'qemu-img convert -O qcow2"), "{message}");
}

#[test]
fn tables_in_holes_of_the_file_cost_nothing() {
    // A file of 96 GiB that takes 12 MiB of the host's disk: 1.5 million tables of zeros.
    let entries = 3_u64 << 19;
    let mut bytes = header(&[(24, 8, entries << 29), (36, 4, entries)]);
    bytes.resize(2 * CLUSTER as usize, 0);
    for index in 0..entries {
        bytes.extend(u64::to_be_bytes((400 + index) * CLUSTER));
    }
    let folder = Folder::new();
    let image = folder.with("holes.qcow2", &bytes);
    let file = File::options().write(true).open(&image).expect("a file");
    file.set_len((400 + entries) * CLUSTER)
        .expect("a file system with holes");
    let message = fails(&format!("{image},format=qcow2"));
    assert!(
        message.contains("lacks a table of reference counts"),
        "{message}"
    );
}

/// qemu-img or qemu-io with these words; `None` without it, which is said.
fn qemu(program: &str, words: &str) -> Option<Output> {
    match Command::new(program).args(words.split(' ')).output() {
        Ok(output) => Some(output),
        Err(error) => {
            println!("skipped: cannot run {program} (package qemu-utils): {error}");
            None
        }
    }
}

/// What a program says that succeeds.
fn said(output: Output) -> String {
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(output.status.success(), "{said}");
    said
}

/// An image that qemu-img made with these words before its name; `None` without qemu-img.
fn made(folder: &Folder, words: &str) -> Option<String> {
    let image = folder.path("made.qcow2");
    let words = format!("create -q -f qcow2 {words} {image} 4M");
    said(qemu("qemu-img", &words)?);
    Some(image)
}

#[test]
fn an_encrypted_image_is_refused_with_what_to_do() {
    for (kind, name) in [("luks", "LUKS"), ("aes", "AES")] {
        let folder = Folder::new();
        let key = folder.with("key", b"secret");
        let more = if kind == "luks" {
            ",encrypt.iter-time=10"
        } else {
            ""
        };
        let words = format!(
            "--object secret,id=s,file={key} -o encrypt.format={kind},encrypt.key-secret=s{more}"
        );
        let Some(image) = made(&folder, &words) else {
            return;
        };
        let before = std::fs::read(&image).expect("a file");
        for readonly in ["", ",readonly"] {
            let message = fails(&format!("{image},format=qcow2{readonly}"));
            assert!(
                message.contains(&format!("it is encrypted ({name})")),
                "{message}"
            );
            // What is advised is done, to the letter.
            let (_, advice) = message.split_once("qemu-img ").expect("advice");
            let plain = folder.path("plain.qcow2");
            let advice = advice
                .replace("PASSPHRASE_FILE", &key)
                .replace("NEW", &plain);
            said(qemu("qemu-img", &advice).expect("it is there"));
            open(&format!("{plain},format=qcow2{readonly}")).expect("opens");
        }
        assert!(
            std::fs::read(&image).expect("a file") == before,
            "it is as it was"
        );
    }
}
