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

mod dts;

use std::borrow::Cow;
use vm_fdt::FdtWriter;

/// The value of one property, in the forms that the devicetree specification (v0.4, section
/// 2.2.4) gives them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// `<empty>`: the property's presence is its meaning.
    Empty,
    /// 32-bit big-endian cells: `<u32>`, `<prop-encoded-array>`, phandles.
    Cells(Vec<u32>),
    /// Cells of which some are phandles of other nodes: the same as [`Value::Cells`] in a blob, a
    /// reference by path in source text.
    References(Vec<Cell>),
    /// 64-bit big-endian numbers, each two cells in size.
    U64s(Vec<u64>),
    /// One or more NUL-terminated strings.
    Strings(Vec<String>),
    /// Raw bytes.
    Bytes(Vec<u8>),
}

/// A cell of [`Value::References`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    /// A number.
    Number(u32),
    /// The phandle of another node.
    Phandle(u32),
}

impl Cell {
    /// The 32 bits that the blob holds.
    #[must_use]
    pub const fn number(self) -> u32 {
        match self {
            Cell::Number(number) | Cell::Phandle(number) => number,
        }
    }
}

impl From<Cell> for Value {
    fn from(cell: Cell) -> Self {
        Value::References(vec![cell])
    }
}

impl<const N: usize> From<[Cell; N]> for Value {
    fn from(cells: [Cell; N]) -> Self {
        Value::References(cells.to_vec())
    }
}

impl From<()> for Value {
    fn from((): ()) -> Self {
        Value::Empty
    }
}

impl From<u32> for Value {
    fn from(cell: u32) -> Self {
        Value::Cells(vec![cell])
    }
}

impl<const N: usize> From<[u32; N]> for Value {
    fn from(cells: [u32; N]) -> Self {
        Value::Cells(cells.to_vec())
    }
}

impl From<Vec<u32>> for Value {
    fn from(cells: Vec<u32>) -> Self {
        Value::Cells(cells)
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Value::U64s(vec![number])
    }
}

impl From<Vec<u64>> for Value {
    fn from(numbers: Vec<u64>) -> Self {
        Value::U64s(numbers)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Value::Strings(vec![text.to_owned()])
    }
}

impl<const N: usize> From<[&str; N]> for Value {
    fn from(texts: [&str; N]) -> Self {
        Value::Strings(texts.iter().map(|&text| text.to_owned()).collect())
    }
}

impl From<&[u8]> for Value {
    fn from(bytes: &[u8]) -> Self {
        Value::Bytes(bytes.to_vec())
    }
}

/// One node: a name (with its unit address), properties and children, all in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    // Nearly all names are literals.
    name: Cow<'static, str>,
    properties: Vec<(Cow<'static, str>, Value)>,
    children: Vec<Node>,
}

/// Why a tree could not be encoded: the offending name and what the format says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("device tree {place}: {cause}")]
pub struct EncodeError {
    place: String,
    cause: String,
}

impl Node {
    /// A node without properties or children; the root's name is empty.
    #[must_use]
    pub fn new(name: impl Into<Cow<'static, str>>) -> Self {
        Node {
            name: name.into(),
            properties: Vec::new(),
            children: Vec::new(),
        }
    }

    /// The node's name, with its unit address (`pl011@9000000`).
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Sets a property; one of the same name is replaced where it stands.
    pub fn prop(
        &mut self,
        name: impl Into<Cow<'static, str>>,
        value: impl Into<Value>,
    ) -> &mut Self {
        let (name, value) = (name.into(), value.into());
        match self.properties.iter_mut().find(|(known, _)| *known == name) {
            Some((_, old)) => *old = value,
            None => self.properties.push((name, value)),
        }
        self
    }

    /// The child of this name, added at the end if there is none.
    pub fn child(&mut self, name: impl Into<Cow<'static, str>>) -> &mut Node {
        let name = name.into();
        let index = self
            .children
            .iter()
            .position(|child| child.name == name)
            .unwrap_or_else(|| {
                self.children.push(Node::new(name));
                self.children.len() - 1
            });
        &mut self.children[index]
    }

    /// The value of a property.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.properties
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value)
    }

    /// The node at a path of names below this one (`["cpus", "cpu@0"]`).
    #[must_use]
    pub fn at(&self, path: &[&str]) -> Option<&Node> {
        path.iter().try_fold(self, |node, name| {
            node.children.iter().find(|child| child.name == *name)
        })
    }

    /// The children, in order.
    #[must_use]
    pub fn children(&self) -> &[Node] {
        &self.children
    }

    /// The blob (devicetree specification v0.4, chapter 5, version 17) with this node as root.
    ///
    /// # Errors
    /// A name or a nesting that the format cannot hold, or two nodes of one phandle.
    pub fn to_dtb(&self) -> Result<Vec<u8>, EncodeError> {
        let error = |cause: vm_fdt::Error| EncodeError {
            place: "as a whole".to_owned(),
            cause: cause.to_string(),
        };
        let mut writer = FdtWriter::new().map_err(error)?;
        self.encode(&mut writer, &mut Vec::new())?;
        writer.finish().map_err(error)
    }

    /// Device-tree source (`/dts-v1/;`) that dtc compiles to the same tree.
    #[must_use]
    pub fn to_dts(&self) -> String {
        dts::print(self)
    }

    /// `bytes` is room for the value of a property, which the writer's own functions would allocate
    /// for each.
    fn encode(&self, writer: &mut FdtWriter, bytes: &mut Vec<u8>) -> Result<(), EncodeError> {
        let error = |cause: vm_fdt::Error| EncodeError {
            place: format!("node '{}'", self.name),
            cause: cause.to_string(),
        };
        let open = writer.begin_node(&self.name).map_err(error)?;
        for (name, value) in &self.properties {
            bytes.clear();
            encode_property(writer, name, value, bytes).map_err(|cause| EncodeError {
                place: format!("property '{name}' of node '{}'", self.name),
                cause: cause.to_string(),
            })?;
        }
        for child in &self.children {
            child.encode(writer, bytes)?;
        }
        writer.end_node(open).map_err(error)
    }
}

fn encode_property(
    writer: &mut FdtWriter,
    name: &str,
    value: &Value,
    bytes: &mut Vec<u8>,
) -> Result<(), vm_fdt::Error> {
    match value {
        // property_phandle is the writer's check that no phandle is given twice.
        Value::Cells(cells) if name == "phandle" && cells.len() == 1 => {
            return writer.property_phandle(cells[0]);
        }
        Value::Empty => {}
        Value::Cells(cells) => bytes.extend(cells.iter().flat_map(|cell| cell.to_be_bytes())),
        Value::References(cells) => {
            bytes.extend(cells.iter().flat_map(|cell| cell.number().to_be_bytes()));
        }
        Value::U64s(numbers) => {
            bytes.extend(numbers.iter().flat_map(|number| number.to_be_bytes()));
        }
        Value::Strings(texts) => {
            for text in texts {
                if text.contains('\0') {
                    return Err(vm_fdt::Error::InvalidString);
                }
                bytes.extend_from_slice(text.as_bytes());
                bytes.push(0);
            }
        }
        Value::Bytes(raw) => return writer.property(name, raw),
    }
    writer.property(name, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn equal_trees_give_equal_blobs() {
        assert_eq!(sample().to_dtb(), sample().to_dtb());
    }

    #[test]
    fn a_property_set_twice_keeps_its_place() {
        let mut root = sample();
        root.prop("#address-cells", 1_u32);
        assert_eq!(root.get("#address-cells"), Some(&Value::Cells(vec![1])));
        assert_eq!(root.properties[0].0, "#address-cells");
    }

    #[test]
    fn a_name_too_long_is_an_error_that_names_it() {
        let mut root = Node::new("");
        root.child("n").prop("p".repeat(32), 1_u32);
        let error = root.to_dtb().expect_err("32 bytes are one too many");
        assert!(error.to_string().contains("pppp"), "{error}");
    }

    #[test]
    fn two_equal_phandles_are_an_error() {
        let mut root = sample();
        root.child("other").prop("phandle", 1_u32);
        assert!(root.to_dtb().is_err());
    }

    #[test]
    fn nodes_are_found_by_path() {
        let root = sample();
        let inner = root.at(&["serial@9000000", "inner"]);
        assert_eq!(inner.map(Node::name), Some("inner"));
        assert_eq!(root.at(&["none"]), None);
    }
}
