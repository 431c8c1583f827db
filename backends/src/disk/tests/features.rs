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
}

#[test]
fn what_is_advised_for_a_damaged_image_makes_one_that_works() {
    type Damage = fn(&mut Vec<u8>, usize, usize);
    let damages: [(&str, Damage); 4] = [
        ("one cluster twice", |bytes, _, l2| {
            bytes.copy_within(l2..l2 + 8, l2 + 8);
        }),
        ("the middle of a cluster", |bytes, l1, _| bytes[l1 + 6] = 2),
        ("points behind its end", |bytes, l1, _| bytes[l1 + 2] = 0x40),
        ("points behind its end", |bytes, _, l2| {
            // As after a power cut.
            bytes.truncate(l2.max(3 << 16) + (2 << 16));
        }),
    ];
    for (what, damage) in damages {
        let folder = Folder::new();
        let Some(image) = converted(&folder, "") else {
            return;
        };
        let mut bytes = std::fs::read(&image).expect("a file");
        let long = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let l1 = long(40) as usize;
        let l2 = (long(l1) & 0x00ff_ffff_ffff_fe00) as usize;
        damage(&mut bytes, l1, l2);
        std::fs::write(&image, bytes).expect("a file");
        let message = fails(&format!("{image},format=qcow2"));
        assert!(message.contains(what), "{message}");
        let new = folder.path("new.qcow2");
        qemu_img(&advised(&message).replace("NEW", &new));
        open(&format!("{new},format=qcow2")).expect("opens");
    }
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
    match Command::new(program)
        .args(words.split_whitespace())
        .output()
    {
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

/// What is on the disks that are made from files here.
fn content() -> Vec<u8> {
    // Runs that compress, zeros, and bytes that do not compress.
    let mut random = 1_u64;
    let byte = move |at: usize| match at / 5000 % 3 {
        0 => (at / 5000) as u8,
        1 => 0,
        _ => {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (random >> 56) as u8
        }
    };
    (0..SIZE).map(byte).collect()
}

/// An image of [`content`] that qemu-img made with these words.
fn converted(folder: &Folder, words: &str) -> Option<String> {
    let (raw, image) = (folder.with("raw", &content()), folder.path("made.qcow2"));
    let words = format!("convert -f raw -O qcow2 {words} {raw} {image}");
    said(qemu("qemu-img", &words)?);
    Some(image)
}

/// Runs qemu-img on an image; it says nothing of interest.
fn qemu_img(words: &str) {
    said(qemu("qemu-img", words).expect("it is there"));
}

/// What the disk of an image is, as QEMU sees it.
fn as_qemu_sees_it(folder: &Folder, image: &str) -> Vec<u8> {
    let raw = folder.path("seen");
    qemu_img(&format!("convert -f qcow2 -O raw {image} {raw}"));
    std::fs::read(raw).expect("a file")
}

/// Reads and writes an image of [`content`] with parts of clusters and whole ones, by two guests,
/// and has QEMU look at it afterwards.
fn works(folder: &Folder, image: &str) {
    let mut model = content();
    let text = format!("{image},format=qcow2");
    for round in 1..=2_u8 {
        let disk = open(&text).expect("opens");
        let mut bench = Bench::new(&disk);
        assert!(bench.read(0, SIZE) == model, "round {round}");
        assert!(bench.read(1536, 3000 * 8) == model[1536..1536 + 3000 * 8]);
        for (offset, len) in [
            (512, 512),
            (60_000 / 512 * 512, 10 * 512),
            (128 << 10, 64 << 10),
        ] {
            let offset = offset + usize::from(round) * 4096;
            bench.write(offset, &vec![round; len]);
            model[offset..offset + len].fill(round);
        }
        let (offset, len) = (200 << 10, 20 << 10);
        let zero = Operation::WriteZeroes { unmap: round == 1 };
        let outcome = bench.run(zero, offset, &mut vec![0; len], &[], false);
        assert_eq!(outcome, Outcome::Done);
        model[offset..offset + len].fill(0);
        let end = SIZE - 512;
        bench.write(end, &[round; 512]);
        model[end..].fill(round);
        assert!(bench.read(0, SIZE) == model, "round {round}, written");
        assert_eq!(bench.flush(), Outcome::Done);
    }
    assert!(
        as_qemu_sees_it(folder, image) == model,
        "QEMU reads what was written"
    );
    qemu_img(&format!("check -q -f qcow2 {image}"));
}

/// Reads an image of [`content`], which stays as it is.
fn is_read(image: &str) {
    let before = std::fs::read(image).expect("a file");
    let disk = open(&format!("{image},format=qcow2,readonly")).expect("opens");
    let mut bench = Bench::new(&disk);
    let content = content();
    assert!(bench.read(0, SIZE) == content);
    assert!(bench.read(70_144, 100 * 512) == content[70_144..70_144 + 100 * 512]);
    drop(bench);
    drop(disk);
    assert!(
        std::fs::read(image).expect("a file") == before,
        "it is as it was"
    );
}

#[test]
fn images_of_every_kind_that_works_are_read_and_written() {
    for words in [
        "",
        "-c",
        "-o compat=0.10",
        "-c -o compat=0.10",
        "-o compat=v3,cluster_size=512",
        "-c -o cluster_size=2M",
        "-o cluster_size=4k,refcount_bits=1",
        "-c -o cluster_size=4k,refcount_bits=64",
        "-o lazy_refcounts=on",
        "-o preallocation=metadata",
        "-o preallocation=falloc",
        "-o preallocation=full",
        "-o compression_type=zstd",
        "-c -o compression_type=zstd",
        "-c -o compression_type=zstd,cluster_size=4k",
        "-c -o compression_type=zstd,cluster_size=2M",
    ] {
        let folder = Folder::new();
        let Some(image) = converted(&folder, words) else {
            return;
        };
        is_read(&image);
        println!("{words}");
        works(&folder, &image);
    }
}

#[test]
fn an_image_compressed_by_zstd_works_behind_another_and_at_any_size() {
    let folder = Folder::new();
    let Some(image) = converted(&folder, "-c -o compression_type=zstd") else {
        return;
    };
    let over = folder.path("over.qcow2");
    qemu_img(&format!("create -q -f qcow2 -F qcow2 -b {image} {over}"));
    let disk = open(&format!("{over},format=qcow2,backing={image}")).expect("opens");
    let mut bench = Bench::new(&disk);
    let mut model = content();
    bench.write(1024, &[9; 1024]);
    model[1024..2048].fill(9);
    assert!(bench.read(0, SIZE) == model);
    drop(bench);
    drop(disk);
    assert!(as_qemu_sees_it(&folder, &over) == model);
    qemu_img(&format!("check -q -f qcow2 {over}"));
    // The last cluster is not whole.
    let raw = folder.with("odd", &content()[..SIZE - 30 * 512]);
    let odd = folder.path("odd.qcow2");
    qemu_img(&format!(
        "convert -c -f raw -O qcow2 -o compression_type=zstd {raw} {odd}"
    ));
    let mut model = content()[..SIZE - 30 * 512].to_vec();
    let disk = open(&format!("{odd},format=qcow2")).expect("opens");
    let mut bench = Bench::new(&disk);
    let end = model.len() - 1024;
    bench.write(end, &[5; 512]);
    model[end..end + 512].fill(5);
    assert!(bench.read(0, model.len()) == model);
    drop(bench);
    drop(disk);
    assert!(as_qemu_sees_it(&folder, &odd) == model);
    qemu_img(&format!("check -q -f qcow2 {odd}"));
}

#[test]
fn an_image_with_extended_l2_entries_is_read() {
    for words in [
        "-o extended_l2=on",
        "-c -o extended_l2=on",
        "-o extended_l2=on,cluster_size=16k",
        "-c -o extended_l2=on,cluster_size=16k,compression_type=zstd",
        "-o extended_l2=on,cluster_size=2M",
    ] {
        let folder = Folder::new();
        let Some(image) = converted(&folder, words) else {
            return;
        };
        is_read(&image);
        // Parts of clusters, zeros and data, over a backing file.
        let over = folder.path("over.qcow2");
        qemu_img(&format!(
            "create -q -f qcow2 -o extended_l2=on,cluster_size=64k -F qcow2 -b {image} {over}"
        ));
        for command in [
            "write -P 7 6k 3k",
            "write -z 100k 8k",
            "write -P 3 128k 64k",
            "discard 160k 8k",
        ] {
            let mut io = Command::new("qemu-io");
            let done = io.args(["-f", "qcow2", "-c", command, &over]).output();
            said(done.expect("qemu-io comes with qemu-img"));
        }
        let seen = as_qemu_sees_it(&folder, &over);
        let disk = open(&format!("{over},format=qcow2,readonly,backing={image}"));
        assert!(
            Bench::new(&disk.expect("opens")).read(0, SIZE) == seen,
            "{words}"
        );
        let message = fails(&format!("{over},format=qcow2,backing={image}"));
        assert!(
            message.contains("add readonly, or 'qemu-img convert"),
            "{message}"
        );
        let plain = folder.path("plain.qcow2");
        qemu_img(&advised(&message).replace("NEW", &plain));
        let disk = open(&format!("{plain},format=qcow2")).expect("opens");
        assert!(Bench::new(&disk).read(0, SIZE) == seen, "{words}");
    }
}

/// The words for qemu-img that a message advises, between quotes.
fn advised(message: &str) -> String {
    let (_, advice) = message.split_once("'qemu-img ").expect("advice");
    let (advice, _) = advice.split_once('\'').expect("an end");
    advice.to_owned()
}

#[test]
fn an_image_with_its_data_in_another_file_is_refused_with_what_to_do() {
    let folder = Folder::new();
    let data = folder.path("data");
    let Some(image) = converted(&folder, &format!("-o data_file={data}")) else {
        return;
    };
    for readonly in ["", ",readonly"] {
        let message = fails(&format!("{image},format=qcow2{readonly}"));
        assert!(
            message.contains("has its data in another file"),
            "{message}"
        );
        let plain = folder.path("plain.qcow2");
        qemu_img(&advised(&message).replace("NEW", &plain));
        let disk = open(&format!("{plain},format=qcow2")).expect("opens");
        assert!(Bench::new(&disk).read(0, SIZE) == content());
    }
}

#[test]
fn snapshots_of_an_image_are_kept() {
    for words in [
        "",
        "-c",
        "-o compat=0.10",
        "-o cluster_size=512",
        "-c -o compression_type=zstd",
    ] {
        let folder = Folder::new();
        let Some(image) = converted(&folder, words) else {
            return;
        };
        qemu_img(&format!("snapshot -c one {image}"));
        is_read(&image);
        works(&folder, &image);
        qemu_img(&format!("snapshot -a one {image}"));
        assert!(
            as_qemu_sees_it(&folder, &image) == content(),
            "{words}: the snapshot has changed"
        );
        qemu_img(&format!("snapshot -d one {image}"));
        works(&folder, &image);
    }
}

/// Has QEMU write to an image and end without closing it.
fn abandoned(image: &str) -> Option<()> {
    // More than one cluster, so that there are counts to be written.
    let write = [
        "-f",
        "qcow2",
        "-c",
        "write -P 6 0 200k",
        "-c",
        "abort",
        image,
    ];
    match Command::new("qemu-io").args(write).output() {
        Ok(_) => {}
        Err(error) => {
            println!("skipped: cannot run qemu-io (package qemu-utils): {error}");
            return None;
        }
    }
    let is_dirty = std::fs::read(image).expect("a file")[79] & 1 != 0;
    assert!(is_dirty, "QEMU marks it");
    let check = qemu("qemu-img", &format!("check -q -f qcow2 {image}")).expect("it is there");
    assert_eq!(check.status.code(), Some(2), "its counts are wrong");
    Some(())
}

#[test]
fn a_dirty_image_is_read_and_is_repaired_before_it_is_written() {
    for words in [
        "-o lazy_refcounts=on",
        "-o lazy_refcounts=on,cluster_size=512",
        "-o lazy_refcounts=on,cluster_size=4k,refcount_bits=1",
        "-c -o lazy_refcounts=on,cluster_size=4k,refcount_bits=64",
    ] {
        let folder = Folder::new();
        let image = folder.path("dirty.qcow2");
        match words.starts_with("-c") {
            true => {
                let Some(made) = converted(&folder, words) else {
                    return;
                };
                std::fs::rename(made, &image).expect("a file");
            }
            false => {
                let words = format!("create -q -f qcow2 {words} {image} {SIZE}");
                let Some(output) = qemu("qemu-img", &words) else {
                    return;
                };
                said(output);
            }
        }
        if abandoned(&image).is_none() {
            return;
        }
        let before = std::fs::read(&image).expect("a file");
        let is = |bytes: &[u8]| bytes[..200 << 10].iter().all(|byte| *byte == 6);
        let disk = open(&format!("{image},format=qcow2,readonly")).expect("opens");
        assert!(is(&Bench::new(&disk).read(0, SIZE)), "{words}");
        drop(disk);
        let disk = open(&format!("{image},format=qcow2")).expect("opens");
        let mut bench = Bench::new(&disk);
        assert!(is(&bench.read(0, SIZE)), "{words}");
        assert!(
            std::fs::read(&image).expect("a file") == before,
            "{words}: as it was so far"
        );
        bench.write(220 << 10, &[8; 1024]);
        assert_eq!(bench.flush(), Outcome::Done);
        drop(bench);
        drop(disk);
        qemu_img(&format!("check -q -f qcow2 {image}"));
        assert!(
            std::fs::read(&image).expect("a file")[79] & 1 == 0,
            "{words}: marked no more"
        );
        assert!(is(&as_qemu_sees_it(&folder, &image)), "{words}");
    }
}

#[test]
fn a_dirty_image_with_snapshots_is_refused_with_what_to_do() {
    let folder = Folder::new();
    let Some(image) = converted(&folder, "-o lazy_refcounts=on") else {
        return;
    };
    qemu_img(&format!("snapshot -c one {image}"));
    if abandoned(&image).is_none() {
        return;
    }
    open(&format!("{image},format=qcow2,readonly")).expect("opens");
    let message = fails(&format!("{image},format=qcow2"));
    assert!(message.contains("has snapshots or bitmaps"), "{message}");
    let (_, advice) = message.split_once("qemu-img ").expect("advice");
    qemu_img(advice);
    open(&format!("{image},format=qcow2")).expect("opens");
}

#[test]
fn a_corrupt_image_is_only_read() {
    let folder = Folder::new();
    let Some(image) = converted(&folder, "") else {
        return;
    };
    let file = File::options().write(true).open(&image).expect("a file");
    file.write_all_at(&[2], 79).expect("room");
    is_read(&image);
    let message = fails(&format!("{image},format=qcow2"));
    assert!(
        message.contains("marked as corrupt and can only be read: add readonly"),
        "{message}"
    );
    let (_, advice) = message.split_once("qemu-img ").expect("advice");
    qemu_img(advice);
    works(&folder, &image);
}

#[test]
fn features_that_nobody_knows_are_refused_or_cleared() {
    for (at, is_refused) in [(72, true), (80, false), (88, false)] {
        let folder = Folder::new();
        let Some(image) = converted(&folder, "") else {
            return;
        };
        let file = File::options().write(true).open(&image).expect("a file");
        file.write_all_at(&[0x80], at).expect("room");
        match is_refused {
            true => {
                for readonly in ["", ",readonly"] {
                    let message = fails(&format!("{image},format=qcow2{readonly}"));
                    assert!(
                        message.contains("needs feature 63 of the format"),
                        "{message}"
                    );
                }
            }
            false => {
                is_read(&image);
                works(&folder, &image);
                let kept = std::fs::read(&image).expect("a file")[at as usize];
                // Compatible ones are for others to know.
                assert_eq!(kept, if at == 80 { 0x80 } else { 0 });
            }
        }
    }
}

#[test]
fn the_name_of_a_backing_file_is_shown_without_control_characters() {
    let folder = Folder::new();
    let mut bytes = header(&[(8, 8, 120), (16, 4, 9)]);
    bytes.resize(3 * CLUSTER as usize, 0);
    bytes[120..129].copy_from_slice(b"a\x1b[2J\r\nb\x07");
    let image = folder.with("named.qcow2", &bytes);
    let message = fails(&format!("{image},format=qcow2,readonly"));
    assert!(
        message.contains("needs 'a\\x1b[2J\\r\\nb\\x07' behind it"),
        "{message}"
    );
    assert!(!message.contains(char::is_control), "{message}");
}
