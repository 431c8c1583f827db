//! A device tree as nodes, properties and values.

use std::borrow::Cow;

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
    /// Returns the 32 bits that the blob holds.
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
    pub(crate) name: Cow<'static, str>,
    pub(crate) properties: Vec<(Cow<'static, str>, Value)>,
    pub(crate) children: Vec<Node>,
}

impl Node {
    /// Creates a node without properties or children; the root's name is empty.
    #[must_use]
    pub fn new(name: impl Into<Cow<'static, str>>) -> Self {
        Node {
            name: name.into(),
            properties: Vec::new(),
            children: Vec::new(),
        }
    }

    /// Returns the node's name, with its unit address (`pl011@9000000`).
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Sets a property; an existing one of the same name is replaced in place.
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

    /// Returns the child of this name, added at the end if there is none.
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

    /// Adds a child of a name that no other child has, at the end. Unlike [`Self::child`] it does not
    /// look for one, which takes time that grows with their number.
    pub fn add_child(&mut self, name: impl Into<Cow<'static, str>>) -> &mut Node {
        self.children.push(Node::new(name));
        let last = self.children.len() - 1;
        &mut self.children[last]
    }

    /// Returns the value of a property.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.properties
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value)
    }

    /// Returns the node at a path of names below this one (`["cpus", "cpu@0"]`).
    #[must_use]
    pub fn at(&self, path: &[&str]) -> Option<&Node> {
        path.iter().try_fold(self, |node, name| {
            node.children.iter().find(|child| child.name == *name)
        })
    }

    /// Returns the children, in order.
    #[must_use]
    pub fn children(&self) -> &[Node] {
        &self.children
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    #[test]
    fn a_property_set_twice_keeps_its_place() {
        let mut root = sample();
        root.prop("#address-cells", 1_u32);
        assert_eq!(root.get("#address-cells"), Some(&Value::Cells(vec![1])));
        assert_eq!(root.properties[0].0, "#address-cells");
    }

    #[test]
    fn nodes_are_found_by_path() {
        let root = sample();
        let inner = root.at(&["serial@9000000", "inner"]);
        assert_eq!(inner.map(Node::name), Some("inner"));
        assert_eq!(root.at(&["none"]), None);
    }
}
