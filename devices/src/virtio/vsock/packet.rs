//! The wire format of the socket device's packets (virtio 1.2, section 5.10.6).

/// Bytes of a packet's header.
pub(in crate::virtio) const HEADER: usize = 44;

/// VIRTIO_VSOCK_TYPE_STREAM.
pub(super) const STREAM: u16 = 1;

/// VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE: the sender receives no more data.
pub(super) const SHUT_RECEIVE: u32 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_SEND: the sender sends no more data.
pub(super) const SHUT_SEND: u32 = 2;
/// Both.
pub(super) const SHUT_BOTH: u32 = SHUT_RECEIVE | SHUT_SEND;

/// A packet's operation (VIRTIO_VSOCK_OP_*).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
}

impl Op {
    const ALL: [(u16, Op); 7] = [
        (1, Op::Request),
        (2, Op::Response),
        (3, Op::Reset),
        (4, Op::Shutdown),
        (5, Op::Data),
        (6, Op::CreditUpdate),
        (7, Op::CreditRequest),
    ];

    /// Returns the operation with this number.
    pub(super) fn of(number: u16) -> Option<Op> {
        Op::ALL
            .iter()
            .find(|(known, _)| *known == number)
            .map(|(_, op)| *op)
    }

    /// Returns its number.
    pub(super) fn number(self) -> u16 {
        let known = Op::ALL.iter().find(|(_, op)| *op == self);
        known.map_or(0, |(number, _)| *number)
    }
}

/// struct virtio_vsock_hdr.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of data after the header.
    pub(super) len: u32,
    /// "type" in the specification.
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// The sender's buffer space for this connection in bytes.
    pub(super) buf_alloc: u32,
    /// Bytes that the sender has consumed from that buffer, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn from_bytes(bytes: &[u8; HEADER]) -> Header {
        let mut left = bytes.as_slice();
        Header {
            src_cid: u64::from_le_bytes(take(&mut left)),
            dst_cid: u64::from_le_bytes(take(&mut left)),
            src_port: u32::from_le_bytes(take(&mut left)),
            dst_port: u32::from_le_bytes(take(&mut left)),
            len: u32::from_le_bytes(take(&mut left)),
            kind: u16::from_le_bytes(take(&mut left)),
            op: u16::from_le_bytes(take(&mut left)),
            flags: u32::from_le_bytes(take(&mut left)),
            buf_alloc: u32::from_le_bytes(take(&mut left)),
            fwd_cnt: u32::from_le_bytes(take(&mut left)),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut left = bytes.as_mut_slice();
        put(&mut left, self.src_cid.to_le_bytes());
        put(&mut left, self.dst_cid.to_le_bytes());
        put(&mut left, self.src_port.to_le_bytes());
        put(&mut left, self.dst_port.to_le_bytes());
        put(&mut left, self.len.to_le_bytes());
        put(&mut left, self.kind.to_le_bytes());
        put(&mut left, self.op.to_le_bytes());
        put(&mut left, self.flags.to_le_bytes());
        put(&mut left, self.buf_alloc.to_le_bytes());
        put(&mut left, self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// Takes the next `N` bytes; all fields together are [`HEADER`] bytes.
fn take<const N: usize>(left: &mut &[u8]) -> [u8; N] {
    let (field, rest) = left.split_first_chunk().expect("a field of the header");
    *left = rest;
    *field
}

fn put<const N: usize>(left: &mut &mut [u8], field: [u8; N]) {
    let all = std::mem::take(left);
    let (place, rest) = all.split_first_chunk_mut().expect("a field of the header");
    *place = field;
    *left = rest;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_the_specification_says() {
        let header = Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 0x1122_3344,
            dst_port: 0x5566_7788,
            len: 9,
            kind: STREAM,
            op: Op::Data.number(),
            flags: SHUT_SEND,
            buf_alloc: 0x1_0000,
            fwd_cnt: 7,
        };
        let bytes = header.to_bytes();
        assert_eq!(bytes[0], 3);
        assert_eq!(bytes[8], 2);
        assert_eq!(bytes[16..20], [0x44, 0x33, 0x22, 0x11]);
        assert_eq!(bytes[20..24], [0x88, 0x77, 0x66, 0x55]);
        assert_eq!(bytes[24], 9);
        assert_eq!(bytes[28], 1);
        assert_eq!(bytes[30], 5);
        assert_eq!(bytes[32], 2);
        assert_eq!(bytes[36..40], [0, 0, 1, 0]);
        assert_eq!(bytes[40], 7);
        assert_eq!(Header::from_bytes(&bytes), header);
    }

    #[test]
    fn operations_keep_their_numbers() {
        assert_eq!(Op::of(0), None);
        assert_eq!(Op::of(8), None);
        for number in 1..8 {
            assert_eq!(Op::of(number).expect("known").number(), number);
        }
    }
}
