//! Encodes a tree as a blob (DTB) (devicetree specification v0.4, chapter 5).

use crate::node::{Node, Value};
use std::collections::BTreeSet;

/// Version of the format, and the oldest that reads it (section 5.2).
const VERSION: u32 = 17;
const COMPATIBLE_VERSION: u32 = 16;
const MAGIC: u32 = 0xd00d_feed;
const HEADER: usize = 40;
/// The end of the list of memory reservations, which is empty (section 5.3).
const NO_RESERVATION: usize = 16;

/// Tokens of the structure block (section 5.4.1).
const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROP: u32 = 3;
const END: u32 = 9;

/// The most characters of a node's name, without unit address, and of a property's (sections 2.2.1
/// and 2.2.4.1).
const LONGEST_NAME: usize = 31;
/// The most nodes inside one another that Linux takes (drivers/of/fdt.c: FDT_MAX_DEPTH).
const DEEPEST: usize = 64;

/// Why a tree could not be encoded: the offending name, and the rule of the format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("device tree {place}: {cause}")]
pub struct EncodeError {
    place: String,
    cause: &'static str,
}

impl Node {
    /// Returns the blob (devicetree specification v0.4, chapter 5, version 17) with this node as
    /// root.
    ///
    /// # Errors
    /// A name or a nesting depth that the format cannot represent, or a duplicate phandle.
    pub fn to_dtb(&self) -> Result<Vec<u8>, EncodeError> {
        let mut blob = Blob {
            bytes: vec![0; HEADER + NO_RESERVATION],
            ..Blob::default()
        };
        self.encode(&mut blob, 0)?;
        blob.finish()
    }

    fn encode<'a>(&'a self, blob: &mut Blob<'a>, depth: usize) -> Result<(), EncodeError> {
        let refused = |cause| EncodeError {
            place: format!("node '{}'", self.name),
            cause,
        };
        if depth == DEEPEST {
            return Err(refused("it lies too deep"));
        }
        if !(depth == 0 && self.name.is_empty() || is_node_name(&self.name)) {
            return Err(refused("its name is not one of the format"));
        }
        blob.cells([BEGIN_NODE]);
        blob.bytes.extend_from_slice(self.name.as_bytes());
        blob.bytes.push(0);
        blob.align();
        for (name, value) in &self.properties {
            blob.property(name, value).map_err(|cause| EncodeError {
                place: format!("property '{name}' of node '{}'", self.name),
                cause,
            })?;
        }
        for child in &self.children {
            child.encode(blob, depth + 1)?;
        }
        blob.cells([END_NODE]);
        Ok(())
    }
}

/// A blob that is being written.
#[derive(Default)]
struct Blob<'a> {
    /// Header, reservations and structure block.
    bytes: Vec<u8>,
    /// The strings block: names of properties.
    strings: Vec<u8>,
    /// Each of them.
    names: Vec<Name<'a>>,
    /// Index in `names` of the one that was used last.
    last: usize,
    phandles: BTreeSet<u32>,
}

/// A property's name.
struct Name<'a> {
    name: &'a str,
    /// Where it lies in the strings block.
    offset: u32,
    /// Index of the one that was used after it: nodes of a kind have the same properties in the same
    /// order.
    next: usize,
}

impl<'a> Blob<'a> {
    fn property(&mut self, name: &'a str, value: &Value) -> Result<(), &'static str> {
        let name_offset = self.name(name)?;
        let header = self.bytes.len();
        self.cells([PROP, 0, name_offset]);
        let start = self.bytes.len();
        match value {
            Value::Empty => {}
            Value::Cells(cells) => {
                if name == "phandle" && !cells.iter().all(|cell| self.phandles.insert(*cell)) {
                    return Err("another node has this phandle");
                }
                for cell in cells {
                    self.cells([*cell]);
                }
            }
            Value::References(cells) => {
                for cell in cells {
                    self.cells([cell.number()]);
                }
            }
            Value::U64s(numbers) => {
                for number in numbers {
                    self.bytes.extend_from_slice(&number.to_be_bytes());
                }
            }
            Value::Text(text) => self.text(text)?,
            Value::Strings(texts) => {
                for text in texts {
                    self.text(text)?;
                }
            }
            Value::Bytes(raw) => self.bytes.extend_from_slice(raw),
        }
        let len = u32::try_from(self.bytes.len() - start).map_err(|_| "it is too long")?;
        self.put(header + 4, len);
        self.align();
        Ok(())
    }

    /// Returns where a property's name lies in the strings block; it is added if it is new.
    fn name(&mut self, name: &'a str) -> Result<u32, &'static str> {
        let last = self.last;
        let is_it = |index: &usize| {
            self.names
                .get(*index)
                .is_some_and(|known| known.name == name)
        };
        let guessed = self.names.get(last).map(|last| last.next).filter(is_it);
        if let Some(index) = guessed.or_else(|| (0..self.names.len()).find(is_it)) {
            self.names[last].next = index;
            self.last = index;
            return Ok(self.names[index].offset);
        }
        let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || b",._+?#-".contains(&byte);
        if name.is_empty() || name.len() > LONGEST_NAME || !name.bytes().all(is_letter) {
            return Err("its name is not one of the format");
        }
        let offset = self.strings.len() as u32;
        self.strings.extend_from_slice(name.as_bytes());
        self.strings.push(0);
        let index = self.names.len();
        self.names.push(Name {
            name,
            offset,
            next: 0,
        });
        self.names[last].next = index;
        self.last = index;
        Ok(offset)
    }

    fn text(&mut self, text: &str) -> Result<(), &'static str> {
        if text.as_bytes().contains(&0) {
            return Err("it has a NUL inside a string");
        }
        self.bytes.extend_from_slice(text.as_bytes());
        self.bytes.push(0);
        Ok(())
    }

    fn cells<const N: usize>(&mut self, cells: [u32; N]) {
        self.bytes
            .extend_from_slice(cells.map(u32::to_be_bytes).as_flattened());
    }

    /// Sets the cell at an offset that is there already.
    fn put(&mut self, offset: usize, cell: u32) {
        self.bytes[offset..offset + 4].copy_from_slice(&cell.to_be_bytes());
    }

    fn align(&mut self) {
        let len = self.bytes.len();
        let missing = len.next_multiple_of(4) - len;
        self.bytes.extend_from_slice(&[0; 4][..missing]);
    }

    /// Adds the end, the strings and the header (section 5.2).
    fn finish(mut self) -> Result<Vec<u8>, EncodeError> {
        self.cells([END]);
        let structure = HEADER + NO_RESERVATION;
        let strings = self.bytes.len();
        self.bytes.append(&mut self.strings);
        let size = self.bytes.len();
        if u32::try_from(size).is_err() {
            return Err(EncodeError {
                place: "as a whole".to_owned(),
                cause: "it is larger than 4 GiB",
            });
        }
        let header = [
            MAGIC,
            size as u32,
            structure as u32,
            strings as u32,
            HEADER as u32,
            VERSION,
            COMPATIBLE_VERSION,
            // The boot CPU.
            0,
            (size - strings) as u32,
            (strings - structure) as u32,
        ];
        for (field, value) in header.into_iter().enumerate() {
            self.put(4 * field, value);
        }
        Ok(self.bytes)
    }
}

/// Whether this is a node's name, with or without a unit address (section 2.2.1).
fn is_node_name(name: &str) -> bool {
    let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || b",._+-".contains(&byte);
    let (name, address) = name.split_once('@').unwrap_or((name, ""));
    let starts = name.as_bytes().first().is_some_and(u8::is_ascii_alphabetic);
    starts && name.len() <= LONGEST_NAME && name.bytes().chain(address.bytes()).all(is_letter)
}

#[cfg(test)]
mod tests {
    use crate::Node;
    use crate::sample;

    #[test]
    fn equal_trees_give_equal_blobs() {
        assert_eq!(sample().to_dtb(), sample().to_dtb());
    }

    #[test]
    fn a_blob_has_header_reservations_structure_and_strings() {
        let mut root = Node::new("");
        root.prop("b", 7_u32);
        root.child("n@1").prop("b", "x").prop("a", ());
        let cells = |bytes: &[u8]| -> Vec<u32> {
            let cells = bytes.chunks(4);
            cells
                .map(|cell| u32::from_be_bytes(cell.try_into().expect("four bytes")))
                .collect()
        };
        let blob = root.to_dtb().expect("a blob");
        let (structure, strings) = blob.split_at(blob.len() - 4);
        assert_eq!(strings, b"b\0a\0");
        #[rustfmt::skip]
        let expected = [
            0xd00d_feed, 132, 56, 128, 40, 17, 16, 0, 4, 72,
            0, 0, 0, 0,
            1, 0, 3, 4, 0, 7,
            1, 0x6e40_3100, 3, 2, 0, 0x7800_0000, 3, 0, 2, 2,
            2, 9,
        ];
        assert_eq!(cells(structure), expected);
    }

    #[test]
    fn a_name_too_long_is_an_error_that_names_it() {
        let mut root = Node::new("");
        root.child("n").prop("p".repeat(32), 1_u32);
        let error = root.to_dtb().expect_err("32 bytes are one too many");
        assert!(error.to_string().contains("pppp"), "{error}");
    }

    #[test]
    fn names_that_the_format_has_not_are_errors_that_name_them() {
        for name in ["", "1n", "n@1@2", "n n", "n@\u{e9}", &"n".repeat(32)] {
            let mut root = Node::new("");
            root.child(name.to_owned());
            let error = root.to_dtb().expect_err(name).to_string();
            assert!(error.contains(&format!("node '{name}'")), "{error}");
        }
        for name in ["", "a b", "a/b"] {
            let mut root = Node::new("");
            root.prop(name.to_owned(), ());
            assert!(root.to_dtb().is_err(), "{name:?}");
        }
    }

    #[test]
    fn what_lies_too_deep_or_has_a_nul_is_an_error() {
        let deep = |depth| {
            let mut root = Node::new("");
            let mut node = &mut root;
            for _ in 1..depth {
                node = node.child("n");
            }
            root.to_dtb()
        };
        assert!(deep(64).is_ok());
        assert!(deep(65).is_err());
        let mut root = Node::new("");
        root.prop("p", "a\0b");
        assert!(root.to_dtb().is_err());
    }

    #[test]
    fn two_equal_phandles_are_an_error() {
        let mut root = sample();
        root.child("other").prop("phandle", 1_u32);
        assert!(root.to_dtb().is_err());
    }
}
