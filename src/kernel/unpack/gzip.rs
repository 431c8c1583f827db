//! gzip (RFC 1952) around the data that flate2 inflates.
//!
//! flate2 reads it too, with crc32fast, whose tables for CPUs of all kinds are 24 KiB of the program.
//! Here the one table is made when there is something to unpack.

use crc::{CRC_32_ISO_HDLC, Crc, Table};
use flate2::bufread::DeflateDecoder;
use std::io::{self, BufRead, ErrorKind, Read};

/// A header with a checksum of its own, of 16 bits (RFC 1952, section 2.3.1: FLG).
const FHCRC: u8 = 1 << 1;
const FEXTRA: u8 = 1 << 2;
const FNAME: u8 = 1 << 3;
const FCOMMENT: u8 = 1 << 4;
const RESERVED: u8 = 0b111 << 5;

/// The unpacked bytes of a member. What follows it is not read.
pub(super) struct Gzip<R> {
    inflated: DeflateDecoder<R>,
    sum: Sum,
    length: u32,
    ended: bool,
}

/// The checksum of the bytes so far.
struct Sum {
    table: Box<Crc<u32, Table<16>>>,
    value: u32,
}

impl Sum {
    fn add(&mut self, bytes: &[u8]) {
        // What the algorithm starts from: the sum without its last step, first bit first.
        let mut sum = self.table.digest_with_initial((!self.value).reverse_bits());
        sum.update(bytes);
        self.value = sum.finalize();
    }
}

impl<R: BufRead> Gzip<R> {
    /// Reads a member's header.
    ///
    /// # Errors
    /// No such header, or a damaged one.
    pub(super) fn new(mut input: R) -> io::Result<Self> {
        let mut sum = Sum {
            table: Box::new(Crc::<u32, Table<16>>::new(&CRC_32_ISO_HDLC)),
            value: 0,
        };
        let mut take = |bytes: &mut [u8]| {
            input.read_exact(bytes)?;
            sum.add(bytes);
            io::Result::Ok(())
        };
        let mut fixed = [0; 10];
        take(&mut fixed)?;
        let [0x1f, 0x8b, 8, flags, ..] = fixed else {
            return Err(invalid("invalid gzip header"));
        };
        if flags & RESERVED != 0 {
            return Err(invalid("invalid gzip header"));
        }
        let (mut word, mut byte) = ([0; 2], [0]);
        if flags & FEXTRA != 0 {
            take(&mut word)?;
            for _ in 0..u16::from_le_bytes(word) {
                take(&mut byte)?;
            }
        }
        for text in [FNAME, FCOMMENT] {
            if flags & text != 0 {
                take(&mut byte)?;
                while byte != [0] {
                    take(&mut byte)?;
                }
            }
        }
        if flags & FHCRC != 0 {
            let expected = sum.value as u16;
            input.read_exact(&mut word)?;
            if u16::from_le_bytes(word) != expected {
                return Err(checksum_differs());
            }
        }
        sum.value = 0;
        Ok(Gzip {
            inflated: DeflateDecoder::new(input),
            sum,
            length: 0,
            ended: false,
        })
    }
}

impl<R: BufRead> Read for Gzip<R> {
    fn read(&mut self, dst: &mut [u8]) -> io::Result<usize> {
        if self.ended || dst.is_empty() {
            return Ok(0);
        }
        let got = self.inflated.read(dst)?;
        self.sum.add(&dst[..got]);
        self.length = self.length.wrapping_add(got as u32);
        if got == 0 {
            let mut trailer = [0; 8];
            self.inflated.get_mut().read_exact(&mut trailer)?;
            self.ended = true;
            // CRC32 and ISIZE, the length modulo 2^32.
            let [sum, length] = [self.sum.value, self.length].map(u32::to_le_bytes);
            if trailer != *[sum, length].as_flattened() {
                return Err(checksum_differs());
            }
        }
        Ok(got)
    }
}

fn checksum_differs() -> io::Error {
    invalid("corrupt gzip stream does not have a matching checksum")
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidInput, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, GzBuilder};
    use std::io::Write as _;

    const TEXT: &[u8] = b"what is in a kernel, and more of what is in a kernel";

    fn packed(header: GzBuilder) -> Vec<u8> {
        let mut encoder = header.write(Vec::new(), Compression::best());
        encoder.write_all(TEXT).expect("in memory");
        encoder.finish().expect("in memory")
    }

    fn unpacked(mut bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        Gzip::new(&mut bytes)?.read_to_end(&mut all)?;
        Ok(all)
    }

    fn refused(bytes: &[u8]) -> String {
        unpacked(bytes).expect_err("damaged").to_string()
    }

    /// A header with all that may be in it, with its checksum: flate2 writes none.
    fn full() -> Vec<u8> {
        let header = GzBuilder::new()
            .extra(vec![7; 300])
            .filename("vmlinux")
            .comment("of\tnobody");
        let mut bytes = packed(header);
        let end = 10 + 2 + 300 + "vmlinux\0of\tnobody\0".len();
        bytes[3] |= FHCRC;
        let sum = Crc::<u32>::new(&CRC_32_ISO_HDLC).checksum(&bytes[..end]) as u16;
        bytes.splice(end..end, sum.to_le_bytes());
        bytes
    }

    #[test]
    fn members_are_unpacked_whatever_their_headers_hold() {
        for mut bytes in [packed(GzBuilder::new()), full()] {
            assert_eq!(unpacked(&bytes).expect("sound"), TEXT);
            // What follows does not count.
            bytes.extend(b"more");
            assert_eq!(unpacked(&bytes).expect("sound"), TEXT);
        }
    }

    #[test]
    fn each_damage_is_noticed() {
        let whole = full();
        for end in 0..whole.len() {
            unpacked(&whole[..end]).expect_err("truncated");
        }
        let header = "invalid gzip header";
        let sum = "corrupt gzip stream does not have a matching checksum";
        let length = whole.len();
        for (at, said) in [
            (0, header),
            (1, header),
            (2, header),
            (20, sum),
            (length - 8, sum),
            (length - 1, sum),
        ] {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            assert_eq!(refused(&bytes), said, "byte {at}");
        }
        let mut bytes = whole;
        bytes[3] |= 1 << 5;
        assert_eq!(refused(&bytes), header);
    }
}
