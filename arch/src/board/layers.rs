//! Merges a board file and those that it inherits from into one tree of values with their places.

use super::error::{BoardError, Place};
use std::sync::Arc;
use toml_span::value::ValueInner;
use toml_span::{Span, Value};

/// The longest chain of inheritance.
const DEEPEST: usize = 8;

/// Finds the file of a board that another inherits from: the first name is that of the file that
/// names it, the second what it names. Gives the name by which further files see it, and its text.
pub type Find<'a> = &'a dyn Fn(&str, &str) -> Result<(String, String), String>;

/// A value with its place.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) item: Item,
    pub(super) place: Place,
    /// The value as TOML, for what is no table.
    pub(super) written: String,
    /// The comment behind it.
    pub(super) note: String,
}

/// What board files hold.
#[derive(Clone, Debug)]
pub(super) enum Item {
    Text(String),
    Number(i64),
    List(Vec<Entry>),
    Table(Tree),
    /// A type that no key accepts: floats, booleans.
    Other,
}

/// A table: its keys and their values, each key once.
#[derive(Clone, Debug, Default)]
pub(super) struct Tree(pub(super) Vec<(String, Entry)>);

impl Tree {
    pub(super) fn has(&self, key: &str) -> bool {
        self.0.iter().any(|(known, _)| known == key)
    }

    pub(super) fn remove(&mut self, key: &str) -> Option<Entry> {
        let index = self.0.iter().position(|(known, _)| known == key)?;
        Some(self.0.swap_remove(index).1)
    }
}

/// Returns the tree of the board file `text`, which is called `name`, with what it inherits.
pub(super) fn read(name: &str, text: &str, find: Find<'_>) -> Result<Tree, BoardError> {
    inherit(name, text, find, 0)
}

/// Returns the tree of one file alone.
pub(super) fn read_alone(text: &str) -> Result<Tree, BoardError> {
    parse(text, None)
}

fn inherit(name: &str, text: &str, find: Find<'_>, depth: usize) -> Result<Tree, BoardError> {
    let mut tree = parse(text, (depth > 0).then_some(name))?;
    let Some(entry) = tree.remove("inherits") else {
        return Ok(tree);
    };
    let refuse = |cause: String| BoardError::Value {
        place: entry.place.clone(),
        key: "inherits".to_owned(),
        cause,
    };
    let Item::Text(wanted) = &entry.item else {
        return Err(refuse("must be a board's name in quotes".to_owned()));
    };
    if depth == DEEPEST {
        return Err(refuse(format!(
            "leads through more than {DEEPEST} files; does a board inherit from itself?"
        )));
    }
    let (parent, text) = find(name, wanted).map_err(refuse)?;
    let mut inherited = inherit(&parent, &text, find, depth + 1)?;
    // Keys that are not inherited.
    for own in ["name", "description", "match"] {
        inherited.remove(own);
    }
    merge(&mut inherited, tree);
    Ok(inherited)
}

/// Merges tables key by key; everything else, including lists of tables, is replaced as a whole.
fn merge(tree: &mut Tree, over: Tree) {
    for (key, entry) in over.0 {
        match (tree.remove(&key), entry) {
            (
                Some(Entry {
                    item: Item::Table(mut below),
                    ..
                }),
                Entry {
                    item: Item::Table(above),
                    place,
                    written,
                    note,
                },
            ) => {
                merge(&mut below, above);
                let item = Item::Table(below);
                let entry = Entry {
                    item,
                    place,
                    written,
                    note,
                };
                tree.0.push((key, entry));
            }
            (_, entry) => tree.0.push((key, entry)),
        }
    }
}

fn parse(text: &str, parent: Option<&str>) -> Result<Tree, BoardError> {
    let file = File {
        text,
        parent: parent.map(Arc::from),
        ends: text.match_indices('\n').map(|(end, _)| end).collect(),
    };
    let mut document = toml_span::parse(text).map_err(|error| BoardError::Syntax {
        place: file.place(error.span.start),
        cause: error.to_string(),
    })?;
    match file.entry(&mut document, 0).item {
        Item::Table(tree) => Ok(tree),
        _ => Ok(Tree::default()),
    }
}

struct File<'a> {
    text: &'a str,
    parent: Option<Arc<str>>,
    /// Where its lines end.
    ends: Vec<usize>,
}

impl File<'_> {
    fn place(&self, offset: usize) -> Place {
        Place {
            parent: self.parent.clone(),
            line: self.ends.partition_point(|end| *end < offset) + 1,
        }
    }

    /// Returns a value whose key, or which itself, begins at `at`.
    fn entry(&self, value: &mut Value<'_>, at: usize) -> Entry {
        let span = value.span;
        let item = match value.take() {
            ValueInner::String(text) => Item::Text(text.into_owned()),
            ValueInner::Integer(number) => Item::Number(number),
            ValueInner::Array(items) => {
                let entries = items.into_iter().map(|mut item| {
                    let at = item.span.start;
                    self.entry(&mut item, at)
                });
                Item::List(entries.collect())
            }
            ValueInner::Table(table) => {
                let mut tree = Tree::default();
                for (key, mut value) in table {
                    let entry = self.entry(&mut value, key.span.start);
                    tree.0.push((key.name.into_owned(), entry));
                }
                Item::Table(tree)
            }
            ValueInner::Float(_) | ValueInner::Boolean(_) => Item::Other,
        };
        Entry {
            written: self.written(&item, span),
            note: self.note(span.end),
            item,
            place: self.place(at),
        }
    }

    /// Returns a value as TOML, for what is no table.
    fn written(&self, item: &Item, span: Span) -> String {
        match item {
            Item::Text(text) => {
                format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
            }
            Item::Number(_) => {
                let digits = self.text.get(span.start..span.end);
                digits.unwrap_or_default().to_owned()
            }
            Item::List(items) => {
                let items: Vec<&str> = items.iter().map(|item| item.written.as_str()).collect();
                format!("[{}]", items.join(", "))
            }
            Item::Table(_) | Item::Other => String::new(),
        }
    }

    /// Returns the comment on the rest of the line from `end` on.
    fn note(&self, end: usize) -> String {
        let rest = self.text.get(end..).unwrap_or_default();
        let line = rest.lines().next().unwrap_or_default();
        let comment = line.split_once('#').map(|(_, comment)| comment.trim());
        comment.unwrap_or_default().to_owned()
    }
}
