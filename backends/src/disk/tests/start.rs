//! What a start changes of an image: nothing, until the guest writes.

use super::*;
use crate::kind::{DeviceOptions, Guest};
use crate::net::NetOptions;
use crate::open::{checked, examine, open as open_wanted};
use crate::pmem::PmemOptions;
use std::process::Command;

/// A qcow2 image with a persistent bitmap, which is good as long as nobody writes that does not
/// know it. Without qemu-img there is none.
fn with_bitmap(folder: &Folder) -> Option<String> {
    let image = folder.path("x.qcow2");
    for words in [
        &["create", "-q", "-f", "qcow2", &image, "1M"] as &[&str],
        &["bitmap", "--add", &image, "b0"],
    ] {
        let Ok(output) = Command::new("qemu-img").args(words).output() else {
            println!("skipped: qemu-img (Debian: qemu-utils) is not here");
            return None;
        };
        assert!(output.status.success(), "qemu-img {words:?}: {output:?}");
    }
    assert!(has_bitmap(&image));
    Some(image)
}

fn has_bitmap(image: &str) -> bool {
    let words = ["info", "-U", "--output=json", image];
    let output = Command::new("qemu-img").args(words).output();
    let output = output.expect("qemu-img can be run");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).contains("\"b0\"")
}

#[test]
fn a_start_that_is_refused_leaves_an_image_as_it_was() {
    let folder = Folder::new();
    let Some(image) = with_bitmap(&folder) else {
        return;
    };
    let before = std::fs::read(&image).expect("an image");
    let text = format!("path={image},format=qcow2");
    let missing = folder.path("missing.img");
    let base = folder.image();
    let guest = Guest {
        memory: 1 << 30,
        parse_size: |_| Ok(0),
        show_size: |bytes| bytes.to_string(),
    };
    let disk = |text: &str| -> Box<dyn DeviceOptions> {
        Box::new(DiskOptions::parse(text).expect("right"))
    };
    let net = NetOptions::parse("tap=armlet-none").expect("right");
    let cases = [
        ("No such file", vec![disk(&text), disk(&missing)]),
        ("is in use", vec![disk(&text), disk(&text)]),
        (
            "stands alone",
            vec![disk(&format!("{text},backing={base}"))],
        ),
        ("armlet-none", vec![disk(&text), Box::new(net)]),
        (
            "cannot open",
            vec![
                disk(&text),
                Box::new(PmemOptions {
                    limits: Default::default(),
                    path: missing.into(),
                    readonly: false,
                }),
            ],
        ),
    ];
    for (words, devices) in cases {
        let wanted = checked(devices, &guest).expect("right");
        let opened = open_wanted(&wanted, guest.memory, None, None, false);
        let Err(error) = opened.and_then(|mut backends| examine(&mut backends)) else {
            panic!("{words}: it is not refused");
        };
        let error = format!("{error:#}");
        assert!(error.contains(words), "{words}: {error}");
        let after = std::fs::read(&image).expect("an image");
        assert!(after == before, "{words}: the image has changed");
    }
}

#[test]
fn an_image_changes_with_the_first_write_of_a_guest() {
    let folder = Folder::new();
    let Some(image) = with_bitmap(&folder) else {
        return;
    };
    let before = std::fs::read(&image).expect("an image");
    let disk = open(&format!("{image},format=qcow2")).expect("opens");
    // Guests that come and go, and write nothing.
    for _ in 0..2 {
        let mut bench = Bench::new(&disk);
        assert!(bench.read(0, 4096) == [0; 4096]);
        assert_eq!(bench.flush(), Outcome::Done);
    }
    assert!(std::fs::read(&image).expect("an image") == before);
    assert!(has_bitmap(&image));
    let mut bench = Bench::new(&disk);
    bench.write(4096, &[7; 4096]);
    // On storage before the data are, whatever becomes of those.
    assert!(!has_bitmap(&image), "the bitmap does not know of the write");
    assert!(bench.read(4096, 4096) == [7; 4096]);
    assert_eq!(bench.flush(), Outcome::Done);
    drop(bench);
    drop(disk);
    // The bitmap's clusters are left over (status 3), and that is all.
    let words = ["check", "-q", "-f", "qcow2", &image];
    let output = Command::new("qemu-img").args(words).output();
    assert_eq!(output.expect("qemu-img can be run").status.code(), Some(3));
}

#[test]
fn an_overlay_changes_with_the_first_write_of_a_guest() {
    let folder = Folder::new();
    let Some(base) = with_bitmap(&folder) else {
        return;
    };
    let image = folder.path("over.qcow2");
    let words = [
        "create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &image,
    ];
    let output = Command::new("qemu-img").args(words).output();
    assert!(output.expect("qemu-img can be run").status.success());
    let before = std::fs::read(&image).expect("an image");
    let disk = open(&format!("{image},format=qcow2,backing={base}")).expect("opens");
    let mut bench = Bench::new(&disk);
    assert!(bench.read(0, 4096) == [0; 4096]);
    assert!(std::fs::read(&image).expect("an image") == before);
    for operation in [
        Operation::Discard,
        Operation::WriteZeroes { unmap: false },
        Operation::Write,
    ] {
        let outcome = bench.run(operation, 512, &mut [9; 512], &[], true);
        assert_eq!(outcome, Outcome::Done);
    }
    assert!(bench.read(512, 512) == [9; 512] && bench.read(1024, 512) == [0; 512]);
    drop(bench);
    drop(disk);
    assert!(std::fs::read(&image).expect("an image") != before);
    assert!(has_bitmap(&base), "it is not written to");
}

#[cfg(feature = "qcow2")]
#[test]
fn before_confinement_no_more_of_a_qcow2_image_is_read_than_its_header() {
    use std::process::Command;
    if Command::new("qemu-img").arg("--version").output().is_err() {
        println!("skipped: no qemu-img here");
        return;
    }
    let folder = Folder::new();
    let path = folder.path("x.qcow2");
    let words = ["create", "-q", "-f", "qcow2", &path, "64M"];
    let made = Command::new("qemu-img").args(words).status();
    assert!(made.expect("it runs").success());
    let file = File::options().read(true).write(true).open(&path);
    let file = file.expect("a file");
    let mut place = [0; 8];
    // Where the table of counts is, and the first of its entries: beyond all bounds (docs/interop/qcow2.rst
    // of QEMU, "Header").
    file.read_exact_at(&mut place, 48).expect("a header");
    let table = u64::from_be_bytes(place);
    file.write_all_at(&[0xff; 8], table).expect("room");
    for cache in ["writeback", "none"] {
        let text = format!("{path},format=qcow2,cache={cache}");
        let opened = DiskOptions::parse(&text).expect("valid").open(0);
        let mut disk = match opened {
            Err(error) if cache == "none" => {
                println!("skipped: {error:#}");
                continue;
            }
            opened => opened.expect("a header that is right"),
        };
        assert_eq!(disk.handle().look().expect("a size"), 64 << 20);
        let error = format!("{:#}", disk.device().err().expect("not examined yet"));
        assert!(error.contains("was not examined"), "{error}");
        let error = format!("{:#}", disk.examine().expect_err("damaged"));
        assert!(error.contains("x.qcow2 is damaged"), "{error}");
    }
}
