//! A flattened device tree as a value.
//!
//! A [`Node`] is built by plain function calls, compared and printed like any other value, and
//! turned into a blob by [`Node::to_dtb`] (encoded by vm-fdt) or into source text by
//! [`Node::to_dts`]. Properties and children keep the order in which they were added, so equal
//! trees give equal bytes. This crate knows nothing of virtual machines.
//!
//! ```
//! use armlet_fdt::Node;
//! let mut root = Node::new("");
//! root.prop("compatible", "linux,dummy-virt");
//! root.child("memory@40000000").prop("device_type", "memory");
//! let dtb = root.to_dtb()?;
//! assert_eq!(&dtb[..4], &[0xd0, 0x0d, 0xfe, 0xed]);
//! # Ok::<(), armlet_fdt::EncodeError>(())
//! ```

mod dtb;
mod dts;
mod node;

pub use dtb::EncodeError;
pub use node::{Cell, Node, Value};

#[cfg(test)]
fn sample() -> Node {
    let mut root = Node::new("");
    root.prop("#address-cells", 2_u32).prop("model", "a \"b\"");
    let serial = root.child("serial@9000000");
    serial
        .prop("reg", vec![0x0900_0000_u64, 0x1000])
        .prop("compatible", ["arm,pl011", "arm,primecell"])
        .prop("phandle", 1_u32);
    serial.child("inner").prop("dma-coherent", ());
    root
}
