//! Tests of how packages are found, on texts as apt prints them.

use super::apt::dependencies;
use super::release::{source_signature, sources};
use super::*;

const DEBIAN: &str = "\
Packages|http://third.example/debian/|bookworm|bookworm|main|amd64|Third|/etc/apt/x.list:1
Packages|http://archive.example/debian/|stable|bookworm|main|amd64|Debian|/etc/apt/debian.sources:1
DEP-11|http://archive.example/debian/|stable|bookworm|main|amd64|Debian|/etc/apt/debian.sources:1
Packages|http://archive.example/sec/|bookworm-security|bookworm-security|main|amd64|Debian|/etc/apt/debian.sources:2
";

fn release(distribution: Distribution, codename: &str) -> Release {
    Release {
        distribution,
        codename: codename.to_owned(),
        stable: true,
    }
}

#[test]
fn debian_sources_gain_backports_and_arm64() {
    let signature = |entry: &str| Some(format!(" key-of-{entry}"));
    let text = sources(
        DEBIAN,
        &release(Distribution::Debian, "bookworm"),
        "amd64",
        &signature,
    )
    .unwrap();
    assert_eq!(
        text,
        "Types: deb\nURIs: http://archive.example/debian/\n\
             Suites: bookworm bookworm-updates bookworm-backports trixie-backports\n\
             Components: main\n\
             Architectures: amd64 arm64\nSigned-By: key-of-/etc/apt/debian.sources:1\n\n\
             Types: deb\nURIs: http://archive.example/sec/\nSuites: bookworm-security\n\
             Components: main\nArchitectures: amd64 arm64\n\
             Signed-By: key-of-/etc/apt/debian.sources:2\n\n"
    );
}

#[test]
fn a_later_debian_still_takes_kernels_from_the_guest_release() {
    let targets = DEBIAN
        .replace("bookworm", "trixie")
        .replace("amd64", "arm64");
    let text = sources(
        &targets,
        &release(Distribution::Debian, "trixie"),
        "arm64",
        &|_| None,
    )
    .unwrap();
    assert!(
        text.contains(
            "Suites: trixie trixie-updates trixie-backports bookworm bookworm-backports\n"
        )
    );
    assert!(text.contains("Architectures: arm64\n"));
    assert!(!text.contains("Signed-By"));
}

#[test]
fn ubuntu_takes_arm64_from_the_ports_that_the_machine_knows() {
    let targets = "\
Packages|http://archive.example/ubuntu/|noble|noble|main|amd64|Ubuntu|/etc/apt/ubuntu.sources:1
Packages|http://ports.example/|noble|noble|main|arm64|Ubuntu|/etc/apt/ports.sources:1
";
    let text = sources(
        targets,
        &release(Distribution::Ubuntu, "noble"),
        "amd64",
        &|_| None,
    )
    .unwrap();
    assert!(text.contains("URIs: http://ports.example/\nSuites: noble noble-updates"));
    assert!(text.contains("Architectures: arm64\n"));
}

#[test]
fn a_machine_without_a_fitting_source_is_told_so() {
    let error = sources(
        "",
        &release(Distribution::Debian, "bookworm"),
        "amd64",
        &|_| None,
    )
    .unwrap_err();
    assert!(
        error.to_string().contains("no source for bookworm"),
        "{error}"
    );
}

#[test]
fn signatures_are_found_in_both_styles() {
    let list =
        "deb http://a.example x main\ndeb [arch=amd64 signed-by=/k.gpg] http://a.example x main\n";
    assert_eq!(
        source_signature("/etc/apt/a.list:2", list),
        Some(" /k.gpg".to_owned())
    );
    assert_eq!(source_signature("/etc/apt/a.list:1", list), None);
    let deb822 = "Types: deb\nURIs: http://a.example\nSigned-By: /a.gpg\n\nTypes: deb\n\
                      Signed-By:\n -----BEGIN\n .\n abc\nSuites: x\n";
    assert_eq!(
        source_signature("/a.sources:1", deb822),
        Some(" /a.gpg".to_owned())
    );
    assert_eq!(
        source_signature("/a.sources:2", deb822),
        Some("\n -----BEGIN\n .\n abc".to_owned())
    );
}

#[test]
fn simulated_installs_are_read() {
    let text = "Inst libslirp0 (4.7.0-1 Debian:12/oldstable [amd64])\n\
                    Inst qemu-utils [1:7.2] (1:10.0 Debian Backports:b [amd64])\nConf libslirp0 (x)\n";
    let names = simulated_installs(text)
        .iter()
        .map(Package::argument)
        .collect::<Vec<_>>();
    assert_eq!(names, ["libslirp0=4.7.0-1", "qemu-utils=1:10.0"]);
}

#[test]
fn the_parts_of_a_kernel_are_found_among_what_its_package_needs() {
    let record = "Package: linux-image-7\nDepends: dracut | linux-initramfs-tool, \
                  linux-base-7 (= 7-1), linux-binary-7 (= 7-1), linux-modules-7 (= 7-1)\n";
    let parts = dependencies(record, &["linux-binary-", "linux-modules-"]);
    assert_eq!(parts, ["linux-binary-7", "linux-modules-7"]);
    let before = "Package: linux-image-6\nDepends: kmod, linux-base (>= 4.3~)\n";
    assert_eq!(dependencies(before, &["linux-binary-"]), [""; 0]);
    let meta = "Depends: linux-base-arm64 (= 7-1), linux-image-7 (= 7-1), linux-modules-arm64\n";
    assert_eq!(dependencies(meta, &["linux-image-"]), ["linux-image-7"]);
}

#[test]
fn releases_are_told_apart() {
    let text = "ID=debian\nVERSION_ID=\"12\"\nVERSION_CODENAME=bookworm\n";
    assert_eq!(
        Release::parse(text).unwrap(),
        release(Distribution::Debian, "bookworm")
    );
    assert!(
        !Release::parse("ID=debian\nVERSION_CODENAME=forky\n")
            .unwrap()
            .stable
    );
    assert!(
        Release::parse("ID=fedora\n")
            .unwrap_err()
            .to_string()
            .contains("fedora")
    );
}

#[test]
fn proxies_are_kept_and_hooks_are_not() {
    let machine =
        "Acquire::http::Proxy \"http://p.example\";\nAPT::Update::Post-Invoke:: \"rm\";\n";
    let text = configuration(Path::new("/c"), "amd64", machine);
    assert!(text.contains("Acquire::http::Proxy \"http://p.example\";\n"));
    assert!(!text.contains("Post-Invoke"));
}

#[test]
fn qemu_versions_are_read() {
    assert_eq!(
        qemu_major("QEMU emulator version 10.0.2 (Debian 1:10)\n"),
        Some(10)
    );
    assert_eq!(qemu_major("nothing"), None);
}
