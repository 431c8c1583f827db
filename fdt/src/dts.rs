//! Device-tree source text of a tree, in the notation of dtc.

use crate::node::{Cell, Node, Value};
use std::collections::BTreeMap;
use std::fmt::Write;

/// Paths of the nodes that have a phandle.
type Paths = BTreeMap<u32, String>;

impl Node {
    /// Returns device-tree source (`/dts-v1/;`) that dtc compiles to the same tree.
    #[must_use]
    pub fn to_dts(&self) -> String {
        print(self)
    }
}

fn print(root: &Node) -> String {
    let mut text = String::from("/dts-v1/;\n\n");
    let mut paths = Paths::new();
    find_phandles(root, "", &mut paths);
    print_node(&mut text, root, 0, &paths);
    text
}

fn find_phandles(node: &Node, path: &str, paths: &mut Paths) {
    if let Some(Value::Cells(cells)) = node.get("phandle")
        && let [phandle] = cells[..]
    {
        paths.insert(phandle, path.to_owned());
    }
    for child in &node.children {
        find_phandles(child, &format!("{path}/{}", child.name), paths);
    }
}

fn print_node(text: &mut String, node: &Node, depth: usize, paths: &Paths) {
    let indent = "\t".repeat(depth);
    let name = if depth == 0 { "/" } else { &node.name };
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{indent}{name} {{");
    for (name, value) in &node.properties {
        let _ = match value {
            Value::Empty => writeln!(text, "{indent}\t{name};"),
            value => writeln!(text, "{indent}\t{name} = {};", notation(value, paths)),
        };
    }
    for (index, child) in node.children.iter().enumerate() {
        if index > 0 || !node.properties.is_empty() {
            text.push('\n');
        }
        print_node(text, child, depth + 1, paths);
    }
    let _ = writeln!(text, "{indent}}};");
}

fn notation(value: &Value, paths: &Paths) -> String {
    match value {
        Value::Empty => String::new(),
        Value::Cells(cells) => cell_list(cells.iter().copied()),
        Value::References(cells) => {
            let cells: Vec<_> = cells.iter().map(|cell| reference(*cell, paths)).collect();
            format!("<{}>", cells.join(" "))
        }
        Value::U64s(numbers) => cell_list(
            numbers
                .iter()
                .flat_map(|number| [(number >> 32) as u32, *number as u32]),
        ),
        Value::Strings(texts) => texts
            .iter()
            .map(|text| format!("\"{}\"", escape(text)))
            .collect::<Vec<_>>()
            .join(", "),
        Value::Bytes(bytes) => {
            let hex: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("[{}]", hex.join(" "))
        }
    }
}

fn reference(cell: Cell, paths: &Paths) -> String {
    match cell {
        Cell::Phandle(phandle) if paths.contains_key(&phandle) => {
            format!("&{{{}}}", paths[&phandle])
        }
        cell => format!("{:#x}", cell.number()),
    }
}

fn cell_list(cells: impl Iterator<Item = u32>) -> String {
    let cells: Vec<_> = cells.map(|cell| format!("{cell:#x}")).collect();
    format!("<{}>", cells.join(" "))
}

fn escape(text: &str) -> String {
    text.chars()
        .flat_map(|c| match c {
            '"' | '\\' => vec!['\\', c],
            '\n' => vec!['\\', 'n'],
            '\t' => vec!['\\', 't'],
            ' '..='~' => vec![c],
            // Other bytes are escaped by number, so that a terminal shows them (dtc's util.c:
            // get_escape_char).
            _ => c
                .encode_utf8(&mut [0; 4])
                .bytes()
                .flat_map(|byte| format!("\\x{byte:02x}").into_bytes())
                .map(char::from)
                .collect(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use crate::{Cell, Node};

    #[test]
    fn references_are_paths() {
        let mut root = Node::new("");
        root.child("a").child("b@1").prop("phandle", 7_u32);
        root.prop("gpios", [Cell::Phandle(7), Cell::Number(3)])
            .prop("none", Cell::Phandle(8));
        let text = root.to_dts();
        assert!(text.contains("gpios = <&{/a/b@1} 0x3>;"), "{text}");
        assert!(text.contains("none = <0x8>;"), "{text}");
    }

    #[test]
    fn every_form_of_value_has_its_notation() {
        let mut root = Node::new("");
        root.prop("empty", ())
            .prop("cell", 7_u32)
            .prop("wide", 0x1_0000_0002_u64)
            .prop("text", "say \"hi\"\\")
            .prop("terminal", "\u{1b}[2J\u{202e}a")
            .prop("list", ["a", "b"])
            .prop("bytes", &[0_u8, 255][..]);
        root.child("leaf@1").prop("reg", [1_u32, 2]);
        assert_eq!(
            root.to_dts(),
            "/dts-v1/;\n\n/ {\n\tempty;\n\tcell = <0x7>;\n\twide = <0x1 0x2>;\n\
             \ttext = \"say \\\"hi\\\"\\\\\";\n\
             \tterminal = \"\\x1b[2J\\xe2\\x80\\xaea\";\n\tlist = \"a\", \"b\";\n\tbytes = [00 ff];\n\n\
             \tleaf@1 {\n\t\treg = <0x1 0x2>;\n\t};\n};\n"
        );
    }
}
