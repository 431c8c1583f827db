//! Device-tree source text of a tree, in the notation of dtc.

use crate::{Node, Value};
use std::fmt::Write;

pub(crate) fn print(root: &Node) -> String {
    let mut text = String::from("/dts-v1/;\n\n");
    print_node(&mut text, root, 0);
    text
}

fn print_node(text: &mut String, node: &Node, depth: usize) {
    let indent = "\t".repeat(depth);
    let name = if depth == 0 { "/" } else { &node.name };
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{indent}{name} {{");
    for (name, value) in &node.properties {
        let _ = match value {
            Value::Empty => writeln!(text, "{indent}\t{name};"),
            value => writeln!(text, "{indent}\t{name} = {};", notation(value)),
        };
    }
    for (index, child) in node.children.iter().enumerate() {
        if index > 0 || !node.properties.is_empty() {
            text.push('\n');
        }
        print_node(text, child, depth + 1);
    }
    let _ = writeln!(text, "{indent}}};");
}

fn notation(value: &Value) -> String {
    match value {
        Value::Empty => String::new(),
        Value::Cells(cells) => cell_list(cells.iter().copied()),
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
            c => vec![c],
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use crate::Node;

    #[test]
    fn every_form_of_value_has_its_notation() {
        let mut root = Node::new("");
        root.prop("empty", ())
            .prop("cell", 7_u32)
            .prop("wide", 0x1_0000_0002_u64)
            .prop("text", "say \"hi\"\\")
            .prop("list", ["a", "b"])
            .prop("bytes", &[0_u8, 255][..]);
        root.child("leaf@1").prop("reg", [1_u32, 2]);
        assert_eq!(
            root.to_dts(),
            "/dts-v1/;\n\n/ {\n\tempty;\n\tcell = <0x7>;\n\twide = <0x1 0x2>;\n\
             \ttext = \"say \\\"hi\\\"\\\\\";\n\tlist = \"a\", \"b\";\n\tbytes = [00 ff];\n\n\
             \tleaf@1 {\n\t\treg = <0x1 0x2>;\n\t};\n};\n"
        );
    }
}
