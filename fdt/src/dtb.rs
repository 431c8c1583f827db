//! Encodes a tree as a blob (DTB) (devicetree specification v0.4, chapter 5).

use crate::node::{Node, Value};
use vm_fdt::FdtWriter;

/// Why a tree could not be encoded: the offending name, and the rule of the format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("device tree {place}: {cause}")]
pub struct EncodeError {
    place: String,
    cause: String,
}

impl Node {
    /// Returns the blob (devicetree specification v0.4, chapter 5, version 17) with this node as
    /// root.
    ///
    /// # Errors
    /// A name or a nesting depth that the format cannot represent, or a duplicate phandle.
    pub fn to_dtb(&self) -> Result<Vec<u8>, EncodeError> {
        let error = |cause: vm_fdt::Error| EncodeError {
            place: "as a whole".to_owned(),
            cause: cause.to_string(),
        };
        let mut writer = FdtWriter::new().map_err(error)?;
        self.encode(&mut writer, &mut Vec::new())?;
        writer.finish().map_err(error)
    }

    /// Encodes a node. `bytes` is a buffer for property values, which the writer's own functions
    /// would allocate each time.
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
        // property_phandle makes the writer check that phandles are unique.
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
    use crate::Node;
    use crate::sample;

    #[test]
    fn equal_trees_give_equal_blobs() {
        assert_eq!(sample().to_dtb(), sample().to_dtb());
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
}
