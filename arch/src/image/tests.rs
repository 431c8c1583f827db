//! Headers as they are, cut, and damaged.

use super::*;
use proptest::prelude::*;

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn arm64(text_offset: u64, image_size: u64, flags: u64) -> Vec<u8> {
    let mut head = vec![0; 64];
    put(&mut head, 0x00, b"MZ\x40\xfa");
    put(&mut head, 0x08, &text_offset.to_le_bytes());
    put(&mut head, 0x10, &image_size.to_le_bytes());
    put(&mut head, 0x18, &flags.to_le_bytes());
    put(&mut head, 0x38, b"ARM\x64");
    head
}

fn bz(version: u16, xloadflags: u16) -> Vec<u8> {
    let mut head = vec![0; 0x400];
    put(&mut head, 0x1f1, &[39]);
    put(&mut head, 0x1f4, &0x1000_u32.to_le_bytes());
    put(&mut head, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(&mut head, 0x202, b"HdrS");
    put(&mut head, 0x206, &version.to_le_bytes());
    put(&mut head, 0x230, &0x20_0000_u32.to_le_bytes());
    put(&mut head, 0x234, &[1]);
    put(&mut head, 0x236, &xloadflags.to_le_bytes());
    put(&mut head, 0x238, &2047_u32.to_le_bytes());
    put(&mut head, 0x258, &0x100_0000_u64.to_le_bytes());
    put(&mut head, 0x260, &0x200_0000_u32.to_le_bytes());
    head
}

/// Start of Debian's vmlinuz-6.1.0-56-cloud-arm64: header, PE header, two sections.
fn debian() -> Vec<u8> {
    let mut head = arm64(0, 0x1ab_0000, 0x0a);
    head.resize(HEAD, 0);
    put(&mut head, 0x3c, &[0x40]);
    put(&mut head, 0x40, b"PE\0\0\x64\xaa\x02\0");
    put(&mut head, 0x54, &[0xa0, 0, 6, 2]);
    for (at, name, size, start) in [
        (0xf8, b".text", 0x144_0000_u32, 0x1_0000_u32),
        (0x120, b".data", 0x5b_9a00, 0x145_0000),
    ] {
        put(&mut head, at, name);
        put(&mut head, at + 16, &size.to_le_bytes());
        put(&mut head, at + 20, &start.to_le_bytes());
    }
    head
}

#[test]
fn debian_image() {
    let image = Arm64Image {
        text_offset: 0,
        image_size: 0x1ab_0000,
        page_size: Some(4096),
        placement: Placement::Anywhere,
        big_endian: false,
    };
    assert_eq!(recognise(&debian()), Ok(Format::Arm64(image)));
    // The file has 0x5c0 bytes of signature after this.
    assert_eq!(file_extent(&debian()), Some(0x1a0_9a00));
}

#[test]
fn arm64_flags() {
    let parse = |flags| Arm64Image::parse(&arm64(0, 0x1000, flags)).unwrap();
    assert_eq!(parse(0).page_size, None);
    assert_eq!(parse(0).placement, Placement::NearRamBase);
    assert_eq!(parse(0x0c).page_size, Some(16384));
    assert_eq!(parse(0x0e).page_size, Some(65536));
    assert_eq!(parse(0x0e).placement, Placement::Anywhere);
    assert!(parse(1).big_endian);
    assert!(!parse(0x0e).big_endian);
}

#[test]
fn kernels_before_3_17_lie_at_0x80000() {
    let image = Arm64Image::parse(&arm64(0x1234_5678_9abc, 0, 0)).unwrap();
    assert_eq!((image.text_offset, image.image_size), (0x8_0000, 0));
}

#[test]
fn absurd_arm64_sizes() {
    let parse = |offset, size| Arm64Image::parse(&arm64(offset, size, 0));
    assert!(parse(0, MAX_IMAGE_SIZE).is_ok());
    for (text_offset, image_size) in [
        (0, MAX_IMAGE_SIZE + 1),
        (0x8_0000, MAX_IMAGE_SIZE),
        (0, u64::MAX),
        (u64::MAX, 0x1000),
    ] {
        let error = parse(text_offset, image_size).unwrap_err();
        assert_eq!(
            error,
            ImageError::ImageSize {
                image_size,
                text_offset
            }
        );
        assert!(error.to_string().contains(&format!("{image_size:#x}")));
    }
    assert_eq!(
        parse(0, 63),
        Err(ImageError::ImageTooSmall { image_size: 63 })
    );
}

#[test]
fn short_and_foreign_arm64_headers() {
    let head = arm64(0, 0x1000, 0);
    assert_eq!(
        Arm64Image::parse(&head[..63]),
        Err(ImageError::Short {
            what: "an arm64 Image",
            len: 63,
            need: 64
        })
    );
    assert!(matches!(
        Arm64Image::parse(&bz(0x20f, 3)),
        Err(ImageError::Unknown { .. })
    ));
}

#[test]
fn bz_image() {
    let Ok(Format::X86(image)) = recognise(&bz(0x20f, 0x7f)) else {
        panic!("not recognised")
    };
    assert_eq!(image.version, 0x20f);
    assert_eq!(image.xloadflags, 0x7f);
    assert!(image.relocatable);
    assert_eq!(image.payload, 40 * 512..40 * 512 + 0x1_0000);
    assert_eq!(image.init_size, 0x200_0000);
    assert_eq!(image.pref_address, 0x100_0000);
    assert_eq!(image.kernel_alignment, 0x20_0000);
    assert_eq!(image.cmdline_size, 2047);
    assert_eq!(image.setup_header.len(), 0x202 + 0x6a - 0x1f1);
    assert_eq!(&image.setup_header[0x11..0x15], b"HdrS");
}

#[test]
fn no_setup_sectors_means_four() {
    let mut head = bz(0x20f, 1);
    head[0x1f1] = 0;
    assert_eq!(X86BzImage::parse(&head).unwrap().payload.start, 5 * 512);
}

#[test]
fn refused_bz_images() {
    let error = X86BzImage::parse(&bz(0x20b, 1)).unwrap_err();
    assert_eq!(error, ImageError::BzVersion { version: 0x20b });
    assert!(error.to_string().contains("protocol 2.11"));
    assert_eq!(
        X86BzImage::parse(&bz(0x20f, 2)),
        Err(ImageError::Bz32Bit { xloadflags: 2 })
    );
    assert_eq!(
        X86BzImage::parse(&bz(0x20f, 1)[..0x240]),
        Err(ImageError::Short {
            what: "a bzImage",
            len: 0x240,
            need: 0x26c
        })
    );
    for (at, value) in [(0x260, 0_u32), (0x260, u32::MAX), (0x230, 0x30_0000)] {
        let mut head = bz(0x20f, 1);
        put(&mut head, at, &value.to_le_bytes());
        assert!(matches!(
            X86BzImage::parse(&head),
            Err(ImageError::BzSize { .. })
        ));
    }
}

#[test]
fn zboot_before_the_image_mark() {
    // Also with the arm64 mark where a zboot file has another: "zimg" decides.
    let mut head = arm64(0, 0x1000, 0);
    put(&mut head, 0, b"MZ\0\0zimg");
    put(&mut head, 8, &0x5000_u32.to_le_bytes());
    put(&mut head, 12, &0x1234_u32.to_le_bytes());
    put(&mut head, 0x18, b"zstd22\0\0");
    assert_eq!(
        recognise(&head),
        Ok(Format::Zboot(Zboot {
            payload: 0x5000..0x6234,
            compression: "zstd22".into()
        }))
    );
    assert_eq!(
        recognise(&head[..0x30]),
        Err(ImageError::Short {
            what: "an EFI zboot file",
            len: 0x30,
            need: 0x38
        })
    );
    // Offsets near the end of u32 do not overflow.
    put(&mut head, 8, &[0xff; 8]);
    assert!(matches!(recognise(&head), Ok(Format::Zboot(_))));
}

#[test]
fn compressed_forms() {
    let lzma = [b"\x5d\0\0\x80\0".as_slice(), &[0xff; 8]].concat();
    for (head, compression) in [
        (b"\x1f\x8b\x08\0".as_slice(), Compression::Gzip),
        (b"\x28\xb5\x2f\xfd", Compression::Zstd),
        (b"\x04\x22\x4d\x18", Compression::Lz4),
        (b"\x02\x21\x4c\x18", Compression::Lz4Legacy),
        (b"\xfd7zXZ\0", Compression::Xz),
        (&lzma, Compression::Lzma),
    ] {
        assert_eq!(recognise(head), Ok(Format::Compressed(compression)));
    }
    // Text that begins with ']' is not .lzma.
    assert!(recognise(b"]\n[kernel]\nimage = ").is_err());
}

#[test]
fn elf_files_are_named() {
    let mut head = b"\x7fELF\x02\x01\x01".to_vec();
    head.resize(64, 0);
    head[18] = 183;
    assert_eq!(recognise(&head), Ok(Format::Elf { machine: 183 }));
    // Big-endian arm64.
    head[5] = 2;
    put(&mut head, 18, &[0, 183]);
    assert_eq!(recognise(&head), Ok(Format::Elf { machine: 183 }));
    assert!(matches!(
        recognise(&head[..10]),
        Err(ImageError::Short { .. })
    ));
    let message = ImageError::Elf { machine: 183 }.to_string();
    assert!(message.contains("arm64") && message.contains("arch/arm64/boot/Image"));
}

#[test]
fn refused_by_name() {
    let mut riscv = arm64(0, 0x1000, 0);
    put(&mut riscv, 0x38, b"RSC\x05");
    let mut zimage = vec![0; 64];
    put(&mut zimage, 0x24, &0x016f_2818_u32.to_le_bytes());
    for (head, name) in [
        (b"\x27\x05\x19\x56".as_slice(), "uImage"),
        (b"\xd0\x0d\xfe\xed", "FIT"),
        (b"ANDROID!", "Android"),
        (b"\x89LZO\0\r\n\x1a\n", "lzop"),
        (b"BZh9", "bzip2"),
        (b"070701", "cpio"),
        (b"MZ\x90\0", "EFI program"),
        (&riscv, "RISC-V"),
        (&zimage, "32-bit arm zImage"),
    ] {
        let error = recognise(head).unwrap_err();
        assert!(matches!(error, ImageError::Unsupported { .. }), "{error}");
        let message = error.to_string();
        assert!(message.contains(name), "{message}");
        assert!(message.contains("zboot"), "says what works: {message}");
    }
}

#[test]
fn unknown_bytes_are_shown() {
    let error = recognise(b"#!/bin/sh").unwrap_err();
    assert_eq!(
        error,
        ImageError::Unknown {
            start: b"#!/bin/s".to_vec()
        }
    );
    assert!(error.to_string().contains("[23, 21, 2f"));
    assert_eq!(recognise(b""), Err(ImageError::Unknown { start: vec![] }));
}

#[test]
fn architectures_are_told_apart() {
    let arm = Header::Arm64(Arm64Image::parse(&debian()).unwrap());
    let x86 = Header::X86(X86Kernel::Bz(X86BzImage::parse(&bz(0x20f, 1)).unwrap()));
    assert!(arm.arm64().is_ok() && x86.x86_64().is_ok());
    let message = x86.arm64().unwrap_err().to_string();
    assert!(message.starts_with("this is an x86_64 bzImage; an arm64 guest takes"));
    assert!(
        arm.x86_64()
            .unwrap_err()
            .to_string()
            .contains("this is an arm64 Image")
    );
}

#[test]
fn damaged_section_tables() {
    let good = debian();
    // Cut off: the table alone needs more.
    assert_eq!(file_extent(&good[..64]), Some(0x58));
    assert_eq!(file_extent(&good[..0x140]), Some(0x148));
    let damaged = |at, value: u32| {
        let mut head = good.clone();
        put(&mut head, at, &value.to_le_bytes());
        file_extent(&head)
    };
    assert_eq!(damaged(0, 0), None);
    assert_eq!(damaged(0x40, 0), None);
    assert_eq!(damaged(0x3c, u32::MAX), Some(0xffff_ffff + 24));
    assert_eq!(damaged(0x46, 0xffff), Some(0x40 + 24 + 0xa0 + 0xffff * 40));
    // Ends beyond 4 GiB do not wrap.
    let mut head = good.clone();
    put(&mut head, 0x120 + 16, &[0xff; 8]);
    assert_eq!(file_extent(&head), Some(0x1_ffff_fffe));
}

proptest! {
    #[test]
    fn no_bytes_panic(head in proptest::collection::vec(any::<u8>(), 0..700)) {
        let _ = recognise(&head).map_err(|error| error.to_string());
        let _ = file_extent(&head);
    }

    /// Good headers cut anywhere, with a byte changed anywhere.
    #[test]
    fn no_damage_panics(
        which in 0..3,
        cut in 0..HEAD,
        at in 0..HEAD,
        value: u8,
    ) {
        let mut head = match which {
            0 => debian(),
            1 => bz(0x20f, 1),
            _ => [b"MZ\0\0zimg".as_slice(), &debian()[8..]].concat(),
        };
        head.truncate(cut);
        if let Some(byte) = head.get_mut(at) {
            *byte = value;
        }
        let _ = recognise(&head).map_err(|error| error.to_string());
        let _ = Arm64Image::parse(&head);
        let _ = X86BzImage::parse(&head);
        let _ = file_extent(&head);
    }
}
