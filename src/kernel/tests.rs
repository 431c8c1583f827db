//! Tests of reading kernels: each form of image, whole, cut short and damaged.

use super::*;
use proptest::prelude::*;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use tempfile::NamedTempFile;

// `image()` by the tool in the comment, reading a pipe (gzip 1.12, zstd 1.5.4, lz4 1.9.4, xz
// 5.4.1).

// `gzip -n -9`
const GZIP: &str = "\
    1f8b0800000000000203edce3d0e82401040e1111011450515ffc5a34041b989b1a4de23cd293ca2952fb1a1\
    2026b66626f932c916f3d675f54bfa73fbac54be4ff370be66df5b11ff1c0d9df86d26e89d894594274d3005\
    ffd119e6c8b0c0122be428b0c6065b94d8618f038e38e18c0baea8404ac96a801011c6b0bef5ad6f7deb5bff\
    9ffb6fe54bfaa200080000";
// `zstd -q -22 --ultra -`
const ZSTD: &str = "\
    28b52ffd0488bd0300124a1821a06b1903ffffffe717fdffe85c13450fe32feefbbeeffbbeeffb7bf6fbffff\
    4e017bb0053bb0015bdaf7666b766663f6655b766553f6644b766443f6633b766333f6622b766223f66153db\
    b00b7bda844f92e8daf3797559a04eeae71c55212b0600807207f6a512621a22c0084805a2e4c01beecba7cb";
// `lz4 -q -9 - -`
const LZ4: &str = "\
    04224d186440a7c1000000584d5a40fa000100122007002f0a0001000bfe0041524d64400000005045000064\
    aa0143000f01001d47070000004700ff71060000940700009408000094090000940a0000940b0000940c0000\
    940d0000940e0000940f00009410000094110000941200009413000094140000941500009416000094170000\
    9418000094190000941a0000941b0000941c0000941d0000941e0000941f0000940000009401000094020000\
    940300009404000094050000948000ffffffffffffd650941f00009400000000b0511d9b";
// `lz4 -q -l -9 - -`
const LZ4_LEGACY: &str = "\
    02214c18c1000000584d5a40fa000100122007002f0a0001000bfe0041524d64400000005045000064aa0143\
    000f01001d47070000004700ff71060000940700009408000094090000940a0000940b0000940c0000940d00\
    00940e0000940f00009410000094110000941200009413000094140000941500009416000094170000941800\
    0094190000941a0000941b0000941c0000941d0000941e0000941f0000940000009401000094020000940300\
    009404000094050000948000ffffffffffffd650941f000094";
// `xz --check=crc32 --arm64 --lzma2=dict=128MiB`
const XZ: &str = "\
    fd377a585a0000016922de3602010a0021011e00756de6ede007ff01475d002696840e9fcf0738be7b391486\
    a791b76f3a309ceba0e54872ea95ccb7bc3728eef196eca3c5b9878b8f9e3b51aedecc39fd202e07154a4b8e\
    e70ef6343db7e05387a22e12a52a341f370d6e8ca5bbdf5510aa494bd69ef9a4e51577fa3d0d67baafcfe3db\
    3bcfd4f2c5d18b444ab362f0b7645a2e91c8ee88f305f7f999383613ce8528cb6641d87ed7aae795f8559d1c\
    0a918be9b359b7546a18b11f6027f15fab4ba4f6625e8a2bdfd7375f2f1ee05ac591e4cd72ebb9317bd3b1f5\
    c547c80c0286cacd1efabb8e529a2f54f00e5eef3d1edfbfbe31814ba0424e40e2da064f11cdaffaa30f6e34\
    60f0bdd519b54f2bba68e7abcb1588d6f0287e91faf0042d516f7821d5453b18349cc516e64ad49663ae5ca1\
    f812e9bed1e34e69223b33d25765b304bf3ccf72f38179d9f86dfd44495a00e5a6326f2617cf97326cec6860\
    d38a787536050000e54bfaa20001df02801000000c3c82ab3e300d8b020000000001595a";
// `lzma -9`
const LZMA: &str = "\
    5d00000004ffffffffffffffff002696840e9fcf0738be7b391486a791b76f3a309ceba0e54872ea95ccb7bc\
    3728eef196eb691202f6aacb5e0f9ce99bcccb99da8337979cab0fe4044f6a8d055a6c5474135066b3ff218d\
    81fe0124106ed1b4f2d748f3259421773a939b5e61f661564e72079b93ffff40100000";
// `zstd -q --long=28 -`
const ZSTD_LONG: &str = "\
    28b52ffd0490ed0300e2091923902bd301ffffff7fbf1fddddf5b374a0d168dc7587f77ddff77ddff777edfb\
    ff273b052dd0010dd0914e7a6b744663f4455b744553f4444b744443f4433b744333f4422b744223f4411bf4\
    d2054dd04a0f5c612620cf1c1d6f1ec763e39219d27c38010800807207f6a512620220bc1817e01610180898\
    035aeecba7cb";
// `xz --check=crc32 --lzma2=dict=192MiB`
const XZ_LARGE: &str = "\
    fd377a585a0000016922de36020021011f000000fe60eddee007ff00675d002696840e9fcf0738be7b391486\
    a791b76f3a309ceba0e54872ea95ccb7bc3728eef196eb691202f6aacb5e0f9ce99bcccb99da8337979cab0f\
    e4044f6a8d055a6c5474135066b3ff218d81fe0124106ed1b4f2d748f3259421773a939b5e61f661564e6ffc\
    4f000000e54bfaa200017f8010000000c48cded83e300d8b020000000001595a";

/// Bytes of `image()`; its header asks for four times as many.
const LEN: usize = 2048;
const MEMORY: usize = 4 * LEN;

/// Returns a small arm64 Image: header, a table of one section that ends with the file, and branch
/// instructions, which the arm64 filter of xz changes.
fn image() -> Vec<u8> {
    let mut image: Vec<u8> = (0..LEN as u32 / 4)
        .flat_map(|i| (0x9400_0000 | i & 0x1f).to_le_bytes())
        .collect();
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0; 0x98]);
    put(0, b"MZ\x40\xfa");
    put(0x10, &(MEMORY as u64).to_le_bytes());
    put(0x18, &[0x0a]);
    put(0x38, b"ARM\x64\x40\0\0\0PE\0\0\x64\xaa\x01\0");
    put(0x54, &[0x20]);
    put(0x78 + 16, &(LEN as u32 - 0x100).to_le_bytes());
    put(0x78 + 20, &0x100_u32.to_le_bytes());
    image
}

fn hex(text: &str) -> Vec<u8> {
    let digit = |c: u8| (c as char).to_digit(16).unwrap() as u8;
    let digits: Vec<u8> = text.bytes().map(digit).collect();
    digits
        .chunks(2)
        .map(|pair| pair[0] << 4 | pair[1])
        .collect()
}

/// Returns each form of `image()`.
fn forms() -> Vec<Vec<u8>> {
    let packed = [GZIP, ZSTD, LZ4, LZ4_LEGACY, XZ, LZMA].map(hex);
    let zboots: Vec<_> = packed.iter().map(|data| zboot(data, "any")).collect();
    [
        vec![image(), with_size(&hex(LZ4_LEGACY))],
        packed.to_vec(),
        zboots,
    ]
    .concat()
}

fn with_size(data: &[u8]) -> Vec<u8> {
    [data, &(LEN as u32).to_le_bytes()].concat()
}

fn zboot(payload: &[u8], name: &str) -> Vec<u8> {
    let mut file = vec![0; 0x100];
    file[..8].copy_from_slice(b"MZ\0\0zimg");
    file[8] = 0;
    file[9] = 1;
    file[12..16].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    file[0x18..0x18 + name.len()].copy_from_slice(name.as_bytes());
    file[0x38..0x3c].copy_from_slice(&0x8182_23cd_u32.to_le_bytes());
    // The appended size, and what the linker adds.
    [&file, payload, &(LEN as u32).to_le_bytes(), &[0; 12]].concat()
}

fn bz_image() -> Vec<u8> {
    let mut file = vec![0; 5 * 512];
    file[0x1f4] = 2; // 32 bytes of protected-mode kernel
    file[0x1fe..0x202].copy_from_slice(&[0x55, 0xaa, 0xeb, 0x6a]);
    file[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
    file[0x232] = 0x20;
    file[0x236] = 1;
    file[0x261] = 0x10;
    file.extend([0xa5; 32]);
    file.extend([0xee; 8]); // a signature
    file
}

fn file(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn open(bytes: &[u8]) -> Result<Kernel> {
    Kernel::open(file(bytes).path())
}

/// Opens and loads into memory filled with 0x5a; says what is there afterwards.
fn load(bytes: &[u8]) -> Result<Vec<u8>> {
    let kernel = open(bytes)?;
    let mut memory = vec![0x5a; kernel.memory_size() as usize];
    let written = kernel.load_into(&mut memory)? as usize;
    assert!(memory[written..].iter().all(|&byte| byte == 0x5a));
    memory.truncate(written);
    Ok(memory)
}

fn message(result: Result<impl Sized>) -> String {
    format!("{:#}", result.err().expect("an error"))
}

fn image_error(result: Result<impl Sized>) -> ImageError {
    let error = result.err().expect("an error");
    error
        .downcast_ref::<ImageError>()
        .expect("an ImageError")
        .clone()
}

#[test]
fn every_form_loads_the_same_bytes() {
    for (index, form) in forms().iter().enumerate() {
        assert_eq!(load(form).unwrap(), image(), "form {index}");
    }
}

#[test]
fn loads_again_from_the_same_inode() {
    for form in forms() {
        let file = file(&form);
        let kernel = Kernel::open(file.path()).unwrap();
        drop(file); // removes the path
        for _ in 0..2 {
            let mut memory = vec![0; MEMORY];
            assert_eq!(kernel.load_into(&mut memory).unwrap(), LEN as u64);
            assert_eq!(memory[..LEN], image());
        }
    }
}

#[test]
fn descriptions() {
    let describe = |bytes: &[u8]| open(bytes).unwrap().describe();
    assert_eq!(describe(&image()), "arm64 Image, 1 MiB, 4 KiB pages");
    assert_eq!(
        describe(&hex(GZIP)),
        "gzip-compressed arm64 Image, 1 MiB, 4 KiB pages"
    );
    assert_eq!(
        describe(&zboot(&hex(ZSTD), "zstd22")),
        "EFI zboot (zstd) arm64 Image, 1 MiB, 4 KiB pages"
    );
    assert_eq!(
        describe(&bz_image()),
        "x86_64 bzImage, 1 MiB, boot protocol 2.15"
    );
    let mut odd = image();
    odd[0x18] = 1;
    assert_eq!(
        describe(&odd),
        "arm64 Image, 1 MiB, page size not stated, big-endian"
    );
}

#[test]
fn bz_image_loads_its_protected_mode_part() {
    let kernel = open(&bz_image()).unwrap();
    assert!(kernel.header().x86_64().is_ok());
    assert_eq!(kernel.memory_size(), 0x1000);
    assert_eq!(load(&bz_image()).unwrap(), [0xa5; 32]);
    let cut = &bz_image()[..5 * 512 + 31];
    let (len, need) = (5 * 512 + 31, 5 * 512 + 32);
    assert_eq!(image_error(open(cut)), ImageError::Truncated { len, need });
}

#[test]
fn an_image_that_does_not_state_its_size() {
    let mut old = image();
    old[0x11] = 0;
    let kernel = open(&old).unwrap();
    assert_eq!(kernel.memory_size(), 2 * LEN as u64);
    assert_eq!(load(&old).unwrap(), old);
    assert_eq!(image_error(open(&gzip(&old))), ImageError::SizeUnknown);
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn packed_things_that_are_no_image() {
    for (inner, name) in [
        (hex(GZIP), "compressed data again"),
        (zboot(&hex(GZIP), "gzip"), "an EFI zboot file"),
        (bz_image(), "an x86_64 bzImage"),
        ([b"\x7fELF".as_slice(), &[0; 60]].concat(), "an ELF file"),
    ] {
        let error = image_error(open(&gzip(&inner)));
        assert_eq!(
            error,
            ImageError::Packed {
                outer: "gzip",
                inner: name
            }
        );
    }
    assert!(message(open(&gzip(b"some text"))).contains("in the gzip data: no known"));
    let plain = message(open(&zboot(&image(), "none")));
    assert!(
        plain.contains("EFI zboot data holds an uncompressed arm64 Image"),
        "{plain}"
    );
    let lzo = message(open(&zboot(b"\x89LZO\0\r\n\x1a\n", "lzo")));
    assert!(
        lzo.contains("payload (lzo): this is lzop-compressed"),
        "{lzo}"
    );
}

#[test]
fn zboot_payload_outside_the_file() {
    let mut form = zboot(&hex(GZIP), "gzip");
    form[15] = 0xff;
    let error = image_error(open(&form));
    assert!(matches!(
        error,
        ImageError::ZbootPayload { offset: 0x100, .. }
    ));
    form[12..16].fill(0);
    assert!(matches!(
        image_error(open(&form)),
        ImageError::ZbootPayload { size: 0, .. }
    ));
}

/// Cut anywhere, each form is refused: when opened, or at the latest when loaded.
#[test]
fn truncation_at_every_length() {
    for (index, form) in forms().iter().enumerate() {
        // What follows a zboot payload is not needed.
        let end = if index < 8 {
            form.len()
        } else {
            form.len() - 16
        };
        for len in 0..end {
            // Without the word that was appended the data are whole.
            if index != 1 || len != end - 4 {
                let error = load(&form[..len]).map(|_| format!("form {index} cut to {len}"));
                let error = format!("{:#}", error.unwrap_err());
                assert!(!error.contains('\n'), "{error}");
            }
        }
    }
}

/// Damage that every decompressor could take for data: the checksums tell.
#[test]
fn damage_is_seen() {
    for form in [GZIP, ZSTD, XZ] {
        let form = hex(form);
        for at in 4..form.len() {
            let mut bad = form.clone();
            bad[at] ^= 0x10;
            // Some bytes mean nothing (time stamps), but none changes the kernel unseen.
            if let Ok(memory) = load(&bad) {
                assert_eq!(memory, image(), "byte {at}");
            }
        }
    }
}

#[test]
fn truncation_is_named() {
    for (form, name) in [GZIP, ZSTD, LZ4, XZ, LZMA]
        .iter()
        .zip(["gzip", "zstd", "lz4", "xz", "lzma"])
    {
        let form = hex(form);
        let error = message(load(&form[..form.len() - 5]));
        let expected = format!("truncated or damaged {name} data after ");
        assert!(error.contains(&expected), "{error}");
        assert!(error.starts_with("cannot "), "{error}");
    }
    let error = image_error(open(&image()[..LEN - 1]));
    let (len, need) = (LEN as u64 - 1, LEN as u64);
    assert_eq!(error, ImageError::Truncated { len, need });
}

/// Legacy lz4 data cut between two blocks look whole: the section table tells.
#[test]
fn legacy_lz4_that_ends_early() {
    let mut word = hex(LZ4_LEGACY);
    word.extend((LEN as u32 + 1).to_le_bytes());
    assert!(message(load(&word)).contains("its last word says 2049"));
    // One block of the first 15 literals and more, as a raw LZ4 sequence.
    let start = &image()[..200];
    let mut block = vec![0xf0, 200 - 15];
    block.extend(start);
    let mut cut = b"\x02\x21\x4c\x18".to_vec();
    cut.extend((block.len() as u32).to_le_bytes());
    cut.extend(block);
    assert_eq!(
        image_error(load(&cut)),
        ImageError::Truncated {
            len: 200,
            need: LEN as u64
        }
    );
}

#[test]
fn more_data_than_the_header_asks_for() {
    // An Image that claims less memory than its file has.
    let mut small = image();
    small[0x11] = 4;
    assert!(message(open(&small)).contains("something is appended"));
    let error = message(load(&gzip(&small)));
    assert!(
        error.contains("unpack to more than the 1024 bytes"),
        "{error}"
    );
    for form in forms().iter().skip(1) {
        let kernel = open(form).unwrap();
        let mut memory = vec![0x5a; LEN + 8];
        assert!(kernel.load_into(&mut memory[..LEN - 1]).is_err());
        assert_eq!(memory[LEN - 1..], [0x5a; 9]);
        // Just enough is enough.
        assert_eq!(kernel.load_into(&mut memory[..LEN]).unwrap(), LEN as u64);
        assert_eq!(memory[LEN..], [0x5a; 8]);
    }
    let kernel = open(&image()).unwrap();
    let error = message(kernel.load_into(&mut [0; LEN - 1]));
    assert!(
        error.contains("its 2048 bytes do not fit into the 2047"),
        "{error}"
    );
}

#[test]
fn windows_are_bounded() {
    assert!(message(open(&hex(ZSTD_LONG))).contains("need a window of 256 MiB; 128 MiB"));
    let xz = message(open(&hex(XZ_LARGE)));
    assert!(
        xz.contains("xz data need a dictionary of more than 128 MiB"),
        "{xz}"
    );
    let mut lzma = hex(LZMA);
    lzma[4] = 0x10; // 256 MiB
    assert!(message(open(&lzma)).contains("lzma data need a dictionary of more than 128 MiB"));
}

#[test]
fn changed_after_opening() {
    let file = file(&image());
    let kernel = Kernel::open(file.path()).unwrap();
    let mut other = image();
    other[0x18] = 0x0c;
    file.as_file().write_all_at(&other, 0).unwrap();
    let error = message(kernel.load_into(&mut [0; MEMORY]));
    assert!(error.contains("its header changed since"), "{error}");
    file.as_file().set_len(100).unwrap();
    let error = message(kernel.load_into(&mut [0; MEMORY]));
    assert!(
        error.contains("it had 2048 bytes when it was opened, now 100"),
        "{error}"
    );
}

#[test]
fn paths_that_are_no_files() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    let empty = dir.path().join("empty");
    File::create(&empty).unwrap();
    let missing = dir.path().join("missing");
    for (path, reason) in [
        (dir.path(), "it is a directory"),
        (&fifo, "not a regular file but a FIFO"),
        (Path::new("/dev/null"), "but a character device"),
        (&empty, "it is empty"),
        (&missing, "No such file"),
    ] {
        for (what, error) in [
            ("kernel", message(Kernel::open(path))),
            ("initrd", message(Initrd::open(path))),
        ] {
            let start = format!("cannot open {what} {}: ", path.display());
            assert!(
                error.starts_with(&start) && error.contains(reason),
                "{error}"
            );
        }
    }
}

#[test]
fn oversized_file() {
    let file = file(&image());
    file.as_file().set_len(MAX_IMAGE_SIZE + 1).unwrap(); // a hole
    assert!(message(Kernel::open(file.path())).contains("1073741825 bytes"));
}

#[test]
fn initrd() {
    let file = file(b"initrd");
    let initrd = Initrd::open(file.path()).unwrap();
    assert_eq!(initrd.size(), 6);
    let mut memory = [0x5a; 8];
    assert_eq!(initrd.load_into(&mut memory).unwrap(), 6);
    assert_eq!(&memory, b"initrdZZ");
    assert!(message(initrd.load_into(&mut [0; 5])).contains("its 6 bytes do not fit"));
    // Grown: still as many bytes as were planned for.
    file.as_file().set_len(100).unwrap();
    assert_eq!(initrd.load_into(&mut memory).unwrap(), 6);
    file.as_file().set_len(5).unwrap();
    let error = message(initrd.load_into(&mut memory));
    assert!(error.starts_with("cannot load initrd /"), "{error}");
    assert!(
        error.contains("it had 6 bytes when it was opened, now 5"),
        "{error}"
    );
}

#[test]
fn lz4_of_tiny_blocks() {
    // Blocks of one literal byte each.
    let mut file = b"\x02\x21\x4c\x18".to_vec();
    for _ in 0..5000 {
        file.extend([2, 0, 0, 0, 0x10, 0]);
    }
    assert!(message(open(&file)).contains("more than 4096 blocks"));
}

proptest! {
    /// Damage anywhere ends in an error or in bytes within `dst`, never in a panic.
    #[test]
    fn no_damage_panics(
        which in 0..14_usize,
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut form = forms().swap_remove(which);
        for (at, value) in damage {
            let at = at.index(form.len());
            form[at] = value;
        }
        if let Ok(kernel) = open(&form) {
            let _ = kernel.describe();
            // Whatever the header claims now, the memory is this.
            let mut memory = vec![0x5a; MEMORY + 8];
            let _ = kernel.load_into(&mut memory[..MEMORY]);
            prop_assert_eq!(&memory[MEMORY..], &[0x5a; 8]);
        }
    }

    #[test]
    fn no_bytes_panic(
        magic in 0..7_usize,
        rest in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        let start = forms()[magic][..4].to_vec();
        let _ = load(&[start, rest].concat());
    }
}

#[test]
fn between_the_segments_of_an_elf_file_are_zeros_whatever_was_there() {
    let mut file = NamedTempFile::new().expect("a file");
    file.write_all(&[1, 2, 3, 4, 5]).expect("room");
    let segment = |file, memory| image::Segment { file, memory };
    let elf = X86Elf {
        // Not in the order of memory; the second ends within the third.
        segments: vec![
            segment(0..2, 0x108..0x10b),
            segment(2..3, 0x100..0x102),
            segment(3..5, 0x101..0x104),
        ],
        notes: 0..0,
        entry: 0x100,
    };
    let mut memory = [0xee; 16];
    let written = load_elf(file.as_file(), &elf, 5, &mut memory).expect("it fits");
    assert_eq!(written, 11);
    assert_eq!(memory[..11], [3, 4, 5, 0, 0, 0, 0, 0, 1, 2, 0]);
    assert_eq!(memory[11..], [0xee; 5]);
}
