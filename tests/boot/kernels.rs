use crate::guest::Armlet;
use crate::rig;
use crate::software::Program;
use flate2::Compression;
use flate2::write::GzEncoder;
use lz4_flex::frame::FrameEncoder;
use lzma_rust2::{LzmaOptions, LzmaWriter, XzOptions, XzWriter};
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

pub(crate) fn gzip(data: &[u8]) -> Vec<u8> {
    let mut packed = GzEncoder::new(Vec::new(), Compression::default());
    packed
        .write_all(data)
        .and_then(|()| packed.finish())
        .expect("memory")
}

fn lz4(data: &[u8]) -> Vec<u8> {
    let mut packed = FrameEncoder::new(Vec::new());
    packed.write_all(data).expect("memory");
    packed.finish().expect("memory")
}

/// The form that `lz4 -l` writes and the kernel's build uses (lz4, doc/lz4_Frame_format.md, "Legacy
/// frame"): a magic number, then blocks of up to 8 MiB with their packed sizes.
fn lz4_legacy(data: &[u8]) -> Vec<u8> {
    let block = lz4_flex::block::compress(data);
    let size = (block.len() as u32).to_le_bytes();
    [&0x184c_2102_u32.to_le_bytes(), &size, block.as_slice()].concat()
}

fn xz(data: &[u8]) -> Vec<u8> {
    let mut packed = XzWriter::new(Vec::new(), XzOptions::with_preset(1)).expect("memory");
    packed.write_all(data).expect("memory");
    packed.finish().expect("memory")
}

fn lzma(data: &[u8]) -> Vec<u8> {
    let options = LzmaOptions::with_preset(1);
    let mut packed = LzmaWriter::new_use_header(Vec::new(), &options, None).expect("memory");
    packed.write_all(data).expect("memory");
    packed.finish().expect("memory")
}

/// An EFI zboot file around packed data (Linux, drivers/firmware/efi/libstub/zboot-header.S).
fn zboot(name: &str, packed: &[u8]) -> Vec<u8> {
    const PAYLOAD: usize = 0x100;
    let mut file = vec![0; PAYLOAD];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x00, b"MZ\0\0zimg");
    put(0x08, &(PAYLOAD as u32).to_le_bytes());
    put(0x0c, &(packed.len() as u32).to_le_bytes());
    put(0x18, name.as_bytes());
    // What EFI stubs of Linux have there.
    put(0x38, &0x8182_23cd_u32.to_le_bytes());
    [file.as_slice(), packed].concat()
}

#[test]
fn a_kernel_starts_from_every_form() {
    let Some(_) = rig::any() else { return };
    let plain = Program::default()
        .print("up\n")
        .power_off()
        .image_of(96 << 10);
    let zstd = |data: &[u8]| compress_to_vec(data, CompressionLevel::Fastest);
    let forms: [(&str, Vec<u8>); 9] = [
        ("plain", plain.clone()),
        ("gzip", gzip(&plain)),
        ("zstd", zstd(&plain)),
        ("lz4", lz4(&plain)),
        ("lz4, legacy", lz4_legacy(&plain)),
        ("xz", xz(&plain)),
        ("lzma", lzma(&plain)),
        ("zboot with gzip", zboot("gzip", &gzip(&plain))),
        ("zboot with zstd", zboot("zstd22", &zstd(&plain))),
    ];
    for (name, file) in forms {
        println!("{name}, {} bytes", file.len());
        assert!(
            name == "plain" || file.len() < plain.len() / 2,
            "{name} does not pack"
        );
        let outcome = Armlet::image(&file).run();
        outcome.assert_status(0);
        assert_eq!(outcome.text(), "up\n", "{name}");
        assert_eq!(outcome.errors, "", "{name}");
    }
}

#[test]
fn a_gzip_compressed_debian_kernel_boots() {
    let Some(rig) = rig::main() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let packed = folder.path().join("vmlinuz");
    gzip_file(&rig.asset("Image"), &packed);
    let outcome = Armlet::script_on(rig, &packed, "uname -r").run();
    assert!(outcome.script().starts_with("6.12."));
}

/// Compresses by the tool that distributions use, or busybox's.
fn gzip_file(from: &Path, to: &Path) {
    let file = |path: &Path| File::open(path).expect("a kernel");
    let status = Command::new("gzip")
        .args(["-1", "-c"])
        .stdin(Stdio::from(file(from)))
        .stdout(Stdio::from(File::create(to).expect("a file")))
        .status();
    assert!(status.expect("gzip").success());
}
