//! The fields of one table of a board file, taken one by one, and the record of where each came
//! from.

use super::error::{BoardError, Place};
use super::layers::{Entry, Item, Tree};
use crate::architecture::Architecture;
use crate::size::parse_size;
use crate::words::nearest;
use std::cell::RefCell;

/// One line of a resolved board.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// The head of a table: `[host]`.
    Table(String),
    /// A value.
    Value {
        key: &'static str,
        written: String,
        /// Where it stands; `None` for a default.
        place: Option<Place>,
        /// The comment behind it.
        note: String,
    },
}

/// What was taken, in order.
pub(super) type Record = RefCell<Vec<Line>>;

/// The fields of one table, taken one by one; what is left at the end is unknown.
pub(super) struct Fields<'a> {
    /// The table's name without brackets; empty at the top.
    path: String,
    /// Whether it is one of a list of tables.
    listed: bool,
    tree: Tree,
    /// Where the fields already taken stand, for errors about their values.
    taken: Vec<(&'static str, Place)>,
    /// Where what is taken is noted, where somebody wants to know.
    record: Option<&'a Record>,
    /// Whether the record has the table's head.
    headed: bool,
}

impl<'a> Fields<'a> {
    pub(super) fn top(tree: Tree, record: Option<&'a Record>) -> Self {
        Fields {
            path: String::new(),
            listed: false,
            tree,
            taken: Vec::new(),
            record,
            headed: true,
        }
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.tree.has(key)
    }

    fn name(&self) -> String {
        match (&self.path, self.listed) {
            (path, _) if path.is_empty() => "the board".to_owned(),
            (path, false) => format!("[{path}]"),
            (path, true) => format!("[[{path}]]"),
        }
    }

    fn below(&self, key: &str, entry: Entry, listed: bool) -> Result<Fields<'a>, BoardError> {
        let path = match self.path.as_str() {
            "" => key.to_owned(),
            path => format!("{path}.{key}"),
        };
        let Item::Table(tree) = entry.item else {
            return Err(BoardError::Value {
                place: entry.place,
                key: path,
                cause: "must be a table".to_owned(),
            });
        };
        Ok(Fields {
            path,
            listed,
            tree,
            taken: Vec::new(),
            record: self.record,
            headed: false,
        })
    }

    fn note(&mut self, line: impl FnOnce() -> Line) {
        let Some(record) = self.record else { return };
        if !self.headed {
            self.headed = true;
            let head = Line::Table(self.name());
            record.borrow_mut().push(head);
        }
        record.borrow_mut().push(line());
    }

    fn take_silently(&mut self, key: &'static str) -> Option<Entry> {
        let entry = self.tree.remove(key)?;
        self.taken.push((key, entry.place.clone()));
        Some(entry)
    }

    fn take(&mut self, key: &'static str) -> Option<Item> {
        let entry = self.take_silently(key)?;
        self.note(|| Line::Value {
            key,
            written: entry.written,
            place: Some(entry.place),
            note: entry.note,
        });
        Some(entry.item)
    }

    /// Records a value that the file does not give.
    fn default(&mut self, key: &'static str, value: &dyn std::fmt::Display) {
        self.note(|| Line::Value {
            key,
            written: format!("\"{value}\""),
            place: None,
            note: String::new(),
        });
    }

    fn missing(&self, key: &str, example: &str) -> BoardError {
        BoardError::Missing {
            table: self.name(),
            key: key.to_owned(),
            example: example.to_owned(),
        }
    }

    pub(super) fn wrong(&self, key: &str, cause: impl Into<String>) -> BoardError {
        let place = self.taken.iter().find(|(taken, _)| *taken == key);
        BoardError::Value {
            place: place.map_or(
                Place {
                    parent: None,
                    line: 1,
                },
                |(_, place)| place.clone(),
            ),
            key: key.to_owned(),
            cause: cause.into(),
        }
    }

    pub(super) fn optional_string(
        &mut self,
        key: &'static str,
    ) -> Result<Option<String>, BoardError> {
        match self.take(key) {
            None => Ok(None),
            Some(Item::Text(text)) if text.contains(char::is_control) => {
                Err(self.wrong(key, "must be one line of printable text"))
            }
            Some(Item::Text(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(key, "must be a string in quotes")),
        }
    }

    pub(super) fn string(
        &mut self,
        key: &'static str,
        example: &str,
    ) -> Result<String, BoardError> {
        self.optional_string(key)?
            .ok_or_else(|| self.missing(key, &format!("{key} = {example}")))
    }

    pub(super) fn optional_number(&mut self, key: &'static str) -> Result<Option<u64>, BoardError> {
        match self.take(key) {
            None => Ok(None),
            Some(Item::Number(number)) => u64::try_from(number)
                .map(Some)
                .map_err(|_| self.wrong(key, format!("is {number}; it can't be negative"))),
            Some(_) => Err(self.wrong(key, "must be a number")),
        }
    }

    pub(super) fn number(&mut self, key: &'static str, example: &str) -> Result<u64, BoardError> {
        self.optional_number(key)?
            .ok_or_else(|| self.missing(key, example))
    }

    pub(super) fn number_u32(
        &mut self,
        key: &'static str,
        example: &str,
    ) -> Result<u32, BoardError> {
        let number = self.number(key, example)?;
        u32::try_from(number).map_err(|_| self.wrong(key, format!("is {number}; that is too many")))
    }

    pub(super) fn interrupt(
        &mut self,
        key: &'static str,
        arch: Architecture,
    ) -> Result<u32, BoardError> {
        let (name, count) = arch.interrupts();
        match self.number_u32(key, &format!("{key} = 1"))? {
            irq if irq < count => Ok(irq),
            irq => {
                let cause = format!("is {irq}; {name}s are numbered 0 to {}", count - 1);
                Err(self.wrong(key, cause))
            }
        }
    }

    pub(super) fn optional_size(&mut self, key: &'static str) -> Result<Option<u64>, BoardError> {
        match self.optional_string(key)?.map(|text| parse_size(&text)) {
            None => Ok(None),
            Some(Ok(0)) => Err(self.wrong(key, "must not be 0")),
            Some(Ok(bytes)) => Ok(Some(bytes)),
            Some(Err(cause)) => Err(self.wrong(key, format!("holds a bad size: {cause}"))),
        }
    }

    pub(super) fn size(&mut self, key: &'static str, example: &str) -> Result<u64, BoardError> {
        self.optional_size(key)?
            .ok_or_else(|| self.missing(key, example))
    }

    /// Returns a value that is written as on the command line, or its default.
    pub(super) fn parsed<T>(&mut self, key: &'static str) -> Result<T, BoardError>
    where
        T: std::str::FromStr<Err = String> + Default + std::fmt::Display,
    {
        if !self.has(key) {
            let value = T::default();
            self.default(key, &value);
            return Ok(value);
        }
        let text = self.optional_string(key)?.unwrap_or_default();
        text.parse()
            .map_err(|cause| self.wrong(key, format!("does not fit: {cause}")))
    }

    /// Returns the items of a list, empty where there is none; refused with `valid` if one does not
    /// fit.
    pub(super) fn list<T>(
        &mut self,
        key: &'static str,
        valid: &str,
        item: impl Fn(&Item) -> Option<T>,
    ) -> Result<Vec<T>, BoardError> {
        let items = match self.take(key) {
            None => return Ok(Vec::new()),
            Some(Item::List(items)) => items.iter().map(|entry| item(&entry.item)).collect(),
            Some(_) => None,
        };
        items.ok_or_else(|| self.wrong(key, format!("must be a list of {valid}")))
    }

    /// As [`Self::list`], for a key that each table has.
    pub(super) fn required_list<T>(
        &mut self,
        key: &'static str,
        valid: &str,
        item: impl Fn(&Item) -> Option<T>,
    ) -> Result<Vec<T>, BoardError> {
        match self.has(key) {
            true => self.list(key, valid, item),
            false => Err(self.missing(key, &format!("{key} = [..]"))),
        }
    }

    pub(super) fn texts(&mut self, key: &'static str) -> Result<Vec<String>, BoardError> {
        self.list(key, "strings in quotes", |item| match item {
            Item::Text(text) if !text.contains(char::is_control) => Some(text.clone()),
            _ => None,
        })
    }

    pub(super) fn optional_table(
        &mut self,
        key: &'static str,
    ) -> Result<Option<Fields<'a>>, BoardError> {
        self.take_silently(key)
            .map(|entry| self.below(key, entry, false))
            .transpose()
    }

    pub(super) fn table(
        &mut self,
        key: &'static str,
        example: &str,
    ) -> Result<Fields<'a>, BoardError> {
        self.optional_table(key)?
            .ok_or_else(|| self.missing(key, example))
    }

    /// Returns the instruction set that the board's guests run.
    pub(super) fn architecture(&mut self) -> Result<Architecture, BoardError> {
        match self.string("arch", "\"aarch64\"")?.as_str() {
            "aarch64" => Ok(Architecture::Aarch64),
            "x86_64" => Ok(Architecture::X86_64),
            other => Err(self.wrong("arch", format!("is '{other}'; use aarch64 or x86_64"))),
        }
    }

    /// Returns the tables of a list.
    pub(super) fn tables(&mut self, key: &'static str) -> Result<Vec<Fields<'a>>, BoardError> {
        match self.take_silently(key).map(|entry| entry.item) {
            None => Ok(Vec::new()),
            Some(Item::List(items)) => items
                .into_iter()
                .map(|entry| self.below(key, entry, true))
                .collect(),
            Some(_) => Err(self.wrong(key, format!("must be a list of tables: [[{key}]]"))),
        }
    }

    pub(super) fn finish(self, known: &[&str]) -> Result<(), BoardError> {
        let Some((key, entry)) = self.tree.0.first() else {
            return Ok(());
        };
        let nearest = nearest(key, known.iter().copied());
        Err(BoardError::UnknownKey {
            place: entry.place.clone(),
            key: key.escape_debug().to_string(),
            table: self.name(),
            nearest: nearest.map_or_else(String::new, |(name, _)| name.to_owned()),
            known: known.join(", "),
        })
    }
}
