//! Which module uses which, read from the source: the circles among them.
//!
//! A module is a file. It depends on another one when its code names an item there:
//!
//! * in a `use`, or in a path such as `crate::board::Board`, `super::parse` or `child::parse`;
//! * where a module only passes an item on (`pub use`), on the module that defines it.
//!
//! These are no dependencies: that a parent declares `mod child;`, that it passes on a child's
//! items, a `use` that only names a module, what is compiled for tests, and comments.

use std::collections::{BTreeMap, VecDeque};

/// A dependency: the line where it is first seen.
type Uses = BTreeMap<String, BTreeMap<String, usize>>;

/// Circles among the files of one crate, each as one line that names its files, with the line of
/// each that makes it depend on the next. Of modules that are tangled up in one another, the
/// shortest circle.
///
/// `files` are path and text; `root` is the path of the crate's root module.
pub(crate) fn circles(root: &str, files: &[(String, String)]) -> Vec<String> {
    let uses = Tree::read(root, files).uses();
    let mut found: Vec<Vec<&str>> = Vec::new();
    for file in uses.keys() {
        let Some(circle) = shortest_circle(&uses, file) else {
            continue;
        };
        let is_known = found
            .iter()
            .any(|known| circle.iter().any(|file| known.contains(file)));
        if !is_known {
            found.push(circle);
        }
    }
    let show = |circle: &Vec<&str>| {
        let mut line = String::new();
        for (index, file) in circle.iter().enumerate() {
            let next = circle[(index + 1) % circle.len()];
            line += &format!("{file}:{} -> ", uses[*file][next]);
        }
        line + circle[0]
    };
    found.iter().map(show).collect()
}

/// The shortest way from `start` back to it.
fn shortest_circle<'a>(uses: &'a Uses, start: &'a str) -> Option<Vec<&'a str>> {
    let mut from: BTreeMap<&str, &str> = BTreeMap::new();
    let mut queue = VecDeque::from([start]);
    while let Some(file) = queue.pop_front() {
        for next in uses.get(file).into_iter().flat_map(BTreeMap::keys) {
            if next == start {
                let mut circle = vec![file];
                while let Some(before) = from.get(circle[circle.len() - 1]) {
                    circle.push(before);
                }
                circle.reverse();
                return Some(circle);
            }
            if !from.contains_key(&**next) {
                from.insert(next, file);
                queue.push_back(next);
            }
        }
    }
    None
}

/// The modules of a crate.
struct Tree {
    modules: Vec<Module>,
}

#[derive(Default)]
struct Module {
    file: String,
    parent: Option<usize>,
    /// Modules in files of their own that it declares.
    children: BTreeMap<String, usize>,
    /// Names that it imports or passes on, with the paths behind them.
    aliases: BTreeMap<String, Vec<String>>,
    /// Paths in its code, with their lines.
    paths: Vec<(Vec<String>, usize)>,
}

impl Tree {
    fn read(root: &str, files: &[(String, String)]) -> Tree {
        let mut tree = Tree {
            modules: Vec::new(),
        };
        tree.add(root, None, files);
        tree
    }

    fn add(&mut self, file: &str, parent: Option<usize>, files: &[(String, String)]) -> usize {
        let (_, text) = files
            .iter()
            .find(|(path, _)| path == file)
            .unwrap_or_else(|| panic!("{file} is declared and not there"));
        let index = self.modules.len();
        let mut parser = Parser::new(text);
        parser.parse();
        self.modules.push(Module {
            file: file.to_owned(),
            parent,
            children: BTreeMap::new(),
            aliases: parser.aliases,
            paths: parser.paths,
        });
        let (folder, name) = file.rsplit_once('/').unwrap_or(("", file));
        let below = match name {
            "lib.rs" | "main.rs" | "mod.rs" => folder.to_owned(),
            _ => file.trim_end_matches(".rs").to_owned(),
        };
        for child in parser.children {
            let flat = format!("{below}/{child}.rs");
            let path = match files.iter().any(|(path, _)| *path == flat) {
                true => flat,
                false => format!("{below}/{child}/mod.rs"),
            };
            let added = self.add(&path, Some(index), files);
            self.modules[index].children.insert(child, added);
        }
        index
    }

    /// What each file depends on.
    fn uses(&self) -> Uses {
        let mut uses = Uses::new();
        for (index, module) in self.modules.iter().enumerate() {
            let of_this = uses.entry(module.file.clone()).or_default();
            for (path, line) in &module.paths {
                if let Some(target) = self.defines(index, path, 0)
                    && target != index
                {
                    of_this
                        .entry(self.modules[target].file.clone())
                        .or_insert(*line);
                }
            }
        }
        uses
    }

    /// The module that defines the item `path` names in `from`. None for what is of another crate,
    /// or a module itself.
    fn defines(&self, from: usize, path: &[String], depth: usize) -> Option<usize> {
        // Names that pass one another on in a circle.
        if depth > 20 {
            return None;
        }
        let mut at = from;
        let mut rest = path;
        let mut is_within = false;
        while let Some((name, after)) = rest.split_first() {
            let module = &self.modules[at];
            match &**name {
                "crate" => at = 0,
                "self" => (),
                "super" => at = module.parent?,
                name => {
                    if let Some(child) = module.children.get(name) {
                        at = *child;
                    } else if let Some(alias) = module.aliases.get(name)
                        && alias != path
                    {
                        let path = [alias.as_slice(), after].concat();
                        return self.defines(at, &path, depth + 1);
                    } else {
                        return is_within.then_some(at);
                    }
                }
            }
            is_within = true;
            rest = after;
        }
        None
    }
}

/// Reads one file.
struct Parser {
    tokens: Vec<(String, usize)>,
    at: usize,
    children: Vec<String>,
    aliases: BTreeMap<String, Vec<String>>,
    paths: Vec<(Vec<String>, usize)>,
    /// Depths of braces at which modules within the file begin.
    inner: Vec<usize>,
    depth: usize,
}

impl Parser {
    fn new(text: &str) -> Parser {
        Parser {
            tokens: tokens(text),
            at: 0,
            children: Vec::new(),
            aliases: BTreeMap::new(),
            paths: Vec::new(),
            inner: Vec::new(),
            depth: 0,
        }
    }

    fn peek(&self, ahead: usize) -> &str {
        self.tokens
            .get(self.at + ahead)
            .map_or("", |(token, _)| token)
    }

    fn line(&self) -> usize {
        self.tokens.get(self.at).map_or(0, |(_, line)| *line)
    }

    fn parse(&mut self) {
        while self.at < self.tokens.len() {
            let test = ["#", "[", "cfg", "(", "test", ")", "]"];
            if (0..test.len()).all(|ahead| self.peek(ahead) == test[ahead]) {
                self.at += test.len();
                self.skip_item();
                continue;
            }
            match self.peek(0) {
                "{" => self.depth += 1,
                "}" => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.inner.last() == Some(&self.depth) {
                        self.inner.pop();
                    }
                }
                "mod" if self.peek(2) == ";" => {
                    self.children.push(self.peek(1).to_owned());
                    self.at += 1;
                }
                "mod" if self.peek(2) == "{" => {
                    self.inner.push(self.depth);
                    self.at += 1;
                }
                // Not the one that says what an `impl Trait` captures.
                "use" if self.peek(1) != "<" => {
                    let is_passed_on = self
                        .at
                        .checked_sub(1)
                        .is_some_and(|before| ["pub", ")"].contains(&&*self.tokens[before].0));
                    self.at += 1;
                    self.parse_use(Vec::new(), is_passed_on);
                    continue;
                }
                token if is_name(token) && self.peek(1) == "::" => {
                    let before = self.at.checked_sub(1).map(|before| &*self.tokens[before].0);
                    let is_start = before != Some("::") && before != Some(".");
                    let line = self.line();
                    let path = self.parse_path();
                    if is_start {
                        self.add_path(path, line);
                    }
                    continue;
                }
                _ => (),
            }
            self.at += 1;
        }
    }

    /// Skips what an attribute belongs to.
    fn skip_item(&mut self) {
        let mut depth = 0_usize;
        while self.at < self.tokens.len() {
            match self.peek(0) {
                "{" | "(" | "[" => depth += 1,
                ")" | "]" => depth = depth.saturating_sub(1),
                "}" => {
                    depth = depth.saturating_sub(1);
                    if depth == 0 {
                        self.at += 1;
                        return;
                    }
                }
                ";" if depth == 0 => {
                    self.at += 1;
                    return;
                }
                _ => (),
            }
            self.at += 1;
        }
    }

    fn parse_path(&mut self) -> Vec<String> {
        let mut path = vec![self.peek(0).to_owned()];
        self.at += 1;
        while self.peek(0) == "::" && is_name(self.peek(1)) {
            path.push(self.peek(1).to_owned());
            self.at += 2;
        }
        path
    }

    /// The tree after `use`, or after a `::` in it.
    fn parse_use(&mut self, before: Vec<String>, is_passed_on: bool) {
        loop {
            let line = self.line();
            let mut path = before.clone();
            loop {
                match self.peek(0) {
                    "::" => self.at += 1,
                    "{" => {
                        self.at += 1;
                        self.parse_use(path.clone(), is_passed_on);
                        break;
                    }
                    "*" => {
                        self.at += 1;
                        path.push("*".to_owned());
                        self.add_path(path.clone(), line);
                        break;
                    }
                    name if is_name(name) => {
                        let is_itself = name == "self" && !path.is_empty();
                        if !is_itself {
                            path.push(name.to_owned());
                        }
                        self.at += 1;
                        if self.peek(0) != "::" {
                            let mut name = path[path.len() - 1].clone();
                            if self.peek(0) == "as" {
                                name = self.peek(1).to_owned();
                                self.at += 2;
                            }
                            // Not an item that is only passed on.
                            if !is_passed_on {
                                self.add_path(path.clone(), line);
                            }
                            let path = self.outside(path.clone());
                            self.aliases.insert(name, path);
                            break;
                        }
                    }
                    _ => break,
                }
            }
            match self.peek(0) {
                "," if self.peek(1) != "}" => self.at += 1,
                "," => {
                    self.at += 2;
                    return;
                }
                _ => {
                    self.at += 1;
                    return;
                }
            }
        }
    }

    fn add_path(&mut self, path: Vec<String>, line: usize) {
        let path = self.outside(path);
        self.paths.push((path, line));
    }

    /// `path` as the file's own module would write it: a module within the file has no file.
    fn outside(&self, mut path: Vec<String>) -> Vec<String> {
        for _ in &self.inner {
            if path.first().is_some_and(|name| name == "super") {
                path[0] = "self".to_owned();
                if path.get(1).is_some_and(|name| name == "super") {
                    path.remove(0);
                    continue;
                }
            }
            break;
        }
        path
    }
}

fn is_name(token: &str) -> bool {
    token.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// Words, `::` and single characters, with their lines, without comments, strings and characters
/// in quotes.
fn tokens(text: &str) -> Vec<(String, usize)> {
    let text: Vec<char> = text.chars().collect();
    let at = |index: usize| text.get(index).copied().unwrap_or('\0');
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    let mut tokens = Vec::new();
    let (mut index, mut line) = (0, 1);
    while index < text.len() {
        let start = index;
        match text[index] {
            '/' if at(index + 1) == '/' => {
                while index < text.len() && text[index] != '\n' {
                    index += 1;
                }
            }
            '/' if at(index + 1) == '*' => {
                index += 2;
                while index < text.len() && (at(index - 1), text[index]) != ('*', '/') {
                    index += 1;
                }
                index += 1;
            }
            'r' if ['"', '#'].contains(&at(index + 1))
                && !(start > 0 && is_part(at(start - 1)) && at(start - 1) != 'b') =>
            {
                index += 1;
                let hashes = text[index..].iter().take_while(|c| **c == '#').count();
                index += hashes;
                if at(index) == '"' {
                    index += 1;
                    let ends = |index: usize| {
                        at(index) == '"' && (1..=hashes).all(|more| at(index + more) == '#')
                    };
                    while index < text.len() && !ends(index) {
                        index += 1;
                    }
                    index += 1 + hashes;
                }
            }
            '"' => {
                index += 1;
                while index < text.len() && text[index] != '"' {
                    index += if text[index] == '\\' { 2 } else { 1 };
                }
                index += 1;
            }
            // A character; else a lifetime.
            '\'' if at(index + 1) == '\\' => {
                index += 3;
                while index < text.len() && text[index] != '\'' {
                    index += 1;
                }
                index += 1;
            }
            '\'' if at(index + 2) == '\'' => index += 3,
            ':' if at(index + 1) == ':' => {
                tokens.push(("::".to_owned(), line));
                index += 2;
            }
            c if is_part(c) => {
                while index < text.len() && is_part(text[index]) {
                    index += 1;
                }
                tokens.push((text[start..index].iter().collect(), line));
            }
            c => {
                if !c.is_whitespace() {
                    tokens.push((c.to_string(), line));
                }
                index += 1;
            }
        }
        let end = index.min(text.len());
        line += text[start..end].iter().filter(|c| **c == '\n').count();
    }
    tokens
}

// ---------------------------------------------------------------- that circles are found

#[cfg(test)]
mod tests {
    use super::circles;

    fn of(files: &[(&str, &str)]) -> Vec<String> {
        let files: Vec<_> = files
            .iter()
            .map(|(path, text)| ((*path).to_owned(), (*text).to_owned()))
            .collect();
        circles("src/lib.rs", &files)
    }

    #[test]
    fn two_modules_that_use_each_other_are_named_with_their_lines() {
        let found = of(&[
            ("src/lib.rs", "mod a;\nmod b;"),
            ("src/a.rs", "\nuse crate::b::B;"),
            ("src/b.rs", "pub struct B;\n\nfn f() -> crate::a::A {}"),
        ]);
        assert_eq!(found, ["src/a.rs:2 -> src/b.rs:3 -> src/a.rs"]);
    }

    #[test]
    fn a_longer_circle_is_found_in_whatever_way_a_path_is_written() {
        let found = of(&[
            ("src/lib.rs", "mod a; mod b;"),
            ("src/a.rs", "mod c; use crate::{b::{self, d}, a::c as e};"),
            ("src/a/c.rs", "fn f() { super::super::b::d() }"),
            ("src/b.rs", "use crate::a; fn d() { a::f() }"),
        ]);
        assert_eq!(found, ["src/a.rs:1 -> src/b.rs:1 -> src/a.rs"]);
        let found = of(&[
            ("src/lib.rs", "mod a; mod b; mod d;"),
            ("src/a.rs", "use crate::b::*;"),
            ("src/b.rs", "use super::d; fn f() { d::g() }"),
            ("src/d/mod.rs", "use super::a::{X, Y};"),
        ]);
        assert_eq!(
            found,
            ["src/a.rs:1 -> src/b.rs:1 -> src/d/mod.rs:1 -> src/a.rs"]
        );
    }

    #[test]
    fn a_parent_and_a_child_that_use_each_other_are_a_circle() {
        let found = of(&[
            ("src/lib.rs", "mod a;"),
            ("src/a.rs", "mod b;\nfn f() { b::g() }"),
            ("src/a/b.rs", "use super::f;"),
        ]);
        assert_eq!(found, ["src/a.rs:2 -> src/a/b.rs:1 -> src/a.rs"]);
    }

    #[test]
    fn an_item_that_is_passed_on_is_its_own_modules() {
        let passed_on = [
            ("src/lib.rs", "mod a; mod b; pub use a::A; pub use b::B;"),
            ("src/a.rs", "use crate::B;"),
            ("src/b.rs", "struct B;"),
        ];
        assert!(of(&passed_on).is_empty());
        let found = of(&[
            passed_on[0],
            passed_on[1],
            ("src/b.rs", "use crate::A; struct B;"),
        ]);
        assert_eq!(found, ["src/a.rs:1 -> src/b.rs:1 -> src/a.rs"]);
    }

    #[test]
    fn what_is_no_dependency_makes_no_circle() {
        let found = of(&[
            ("src/lib.rs", "pub mod a; mod b;"),
            (
                "src/a.rs",
                "mod c; use crate::b; #[cfg(test)] mod tests { use crate::b::B; }\n\
                 // crate::b::B\n/* crate::b::B */ const S: &str = \"crate::b::B\";",
            ),
            ("src/a/c.rs", "use super::A; pub(in crate::a) fn f() {}"),
            (
                "src/b.rs",
                "use crate::a::A; mod d { use super::B; fn f(b: &'static str) { 'x'; '\\''; } }",
            ),
        ]);
        assert_eq!(found, Vec::<String>::new());
    }
}
