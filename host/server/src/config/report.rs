//! Mistakes in a configuration file, told like a compiler tells them: line, column, key, what is
//! wrong, what is allowed.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Issue {
    /// Dotted key, such as `server.listen` or `routes.0.prefix`; empty when the text is no TOML.
    pub key: String,
    /// What is wrong, lower case, one sentence.
    pub message: String,
    /// What would be right; empty when the message says it.
    pub allowed: String,
    /// Line, from 1; none when the file does not mention the key (a default does).
    pub line: Option<usize>,
    /// Column in characters, from 1.
    pub column: Option<usize>,
    /// The line's text, and the columns to underline.
    #[serde(skip)]
    excerpt: Option<(String, Range<usize>)>,
}

impl Issue {
    /// A mistake known by its key; where it stands is looked up later.
    #[must_use]
    pub fn at_key(key: impl Into<String>, message: impl Into<String>, allowed: &str) -> Self {
        Self {
            key: key.into(),
            message: message.into(),
            allowed: allowed.to_owned(),
            line: None,
            column: None,
            excerpt: None,
        }
    }

    fn place(&mut self, text: &str, span: Range<usize>) {
        let start = floor(text, span.start);
        let line_start = text[..start].rfind('\n').map_or(0, |at| at + 1);
        let line_end = text[start..].find('\n').map_or(text.len(), |at| start + at);
        let end = floor(text, span.end).clamp(start, line_end);
        let column = text[line_start..start].chars().count();
        let width = text[start..end].chars().count().max(1);
        self.line = Some(text[..line_start].matches('\n').count() + 1);
        self.column = Some(column + 1);
        let line = text[line_start..line_end].trim_end().to_owned();
        self.excerpt = Some((line, column..column + width));
    }
}

fn floor(text: &str, mut at: usize) -> usize {
    at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// Why a configuration was refused: the file and every mistake found in it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct ConfigError {
    /// The file, as it was named.
    pub file: PathBuf,
    /// At least one mistake.
    pub issues: Vec<Issue>,
}

impl ConfigError {
    /// Mistakes of meaning, each placed at its key.
    #[must_use]
    pub fn semantic(text: &str, file: &Path, mut issues: Vec<Issue>) -> Self {
        for issue in &mut issues {
            if let Some(span) = span_of(text, &issue.key) {
                issue.place(text, span);
            }
        }
        Self {
            file: file.to_owned(),
            issues,
        }
    }

    /// The file cannot be read.
    #[must_use]
    pub fn unreadable(file: &Path, error: &std::io::Error) -> Self {
        let issue = Issue::at_key(
            "",
            format!("cannot be read: {error}"),
            "a readable TOML file",
        );
        Self {
            file: file.to_owned(),
            issues: vec![issue],
        }
    }

    /// The mistakes on one line, for a log.
    #[must_use]
    pub fn one_line(&self) -> String {
        let lines = self.issues.iter().map(|issue| {
            // What is about no key is about the file.
            let file = self.file.display();
            let at = match (issue.line, issue.key.as_str()) {
                (None, "") => file.to_string(),
                (Some(line), "") => format!("{file}, line {line}"),
                (None, key) => key.to_owned(),
                (Some(line), key) => format!("line {line}, {key}"),
            };
            format!("{at}: {}", issue.message)
        });
        lines.collect::<Vec<_>>().join("; ")
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, issue) in self.issues.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write_issue(f, &self.file, issue)?;
        }
        Ok(())
    }
}

fn write_issue(f: &mut fmt::Formatter<'_>, file: &Path, issue: &Issue) -> fmt::Result {
    writeln!(f, "error: {}", issue.message)?;
    write!(f, "  --> {}", file.display())?;
    if let (Some(line), Some(column)) = (issue.line, issue.column) {
        write!(f, ":{line}:{column}")?;
    }
    if !issue.key.is_empty() {
        write!(f, " ({})", issue.key)?;
    }
    let gutter = issue.line.map_or(1, |line| line.to_string().len());
    if let (Some(line), Some((text, columns))) = (issue.line, &issue.excerpt) {
        let underline = "^".repeat(columns.len());
        write!(
            f,
            "\n {:gutter$} |\n {line} | {text}\n {:gutter$} | ",
            "", ""
        )?;
        write!(f, "{:1$}{underline}", "", columns.start)?;
    }
    if !issue.allowed.is_empty() {
        write!(f, "\n {:gutter$} = allowed: {}", "", issue.allowed)?;
    }
    Ok(())
}

/// Most mistakes of one file that are told: whoever has more has another kind of file.
const ISSUES_MAX: usize = 50;

/// Reads TOML into `T`, turning the reader's errors into ours. It stops at the first, so what is wrong is taken away and the rest is
/// read again.
pub(super) fn deserialize<T: DeserializeOwned>(text: &str, file: &Path) -> Result<T, ConfigError> {
    let refused = |issues| ConfigError {
        file: file.to_owned(),
        issues,
    };
    let mut table =
        DeTable::parse(text).map_err(|error| refused(vec![issue(text, &error, String::new())]))?;
    let (mut issues, mut removed) = (Vec::new(), Vec::<Vec<String>>::new());
    loop {
        let error = match T::deserialize(toml::Deserializer::from(table.clone())) {
            Ok(read) if issues.is_empty() => return Ok(read),
            Ok(_) => return Err(refused(issues)),
            Err(error) => error,
        };
        let mut path = Vec::new();
        if let Some(span) = error.span() {
            collect_key(table.get_ref(), span.start, &mut path);
        }
        if !is_of_our_making(&error, &path, &removed) {
            issues.push(issue(text, &error, path.join(".")));
        }
        if !remove(table.get_mut(), &path) || issues.len() == ISSUES_MAX {
            return Err(refused(issues));
        }
        removed.push(path);
    }
}

/// Whether an error is only that a key is missing that was taken away before.
fn is_of_our_making(error: &toml::de::Error, path: &[String], removed: &[Vec<String>]) -> bool {
    let missing = error.message().strip_prefix("missing field `");
    let missing = missing.and_then(|name| name.trim_end().strip_suffix('`'));
    missing.is_some_and(|missing| {
        let mut below = removed.iter().filter(|removed| removed.starts_with(path));
        below.any(|removed| removed.last().is_some_and(|name| name == missing))
    })
}

fn issue(text: &str, error: &toml::de::Error, key: String) -> Issue {
    let (message, allowed) = split_allowed(error.message());
    let mut issue = Issue::at_key(key, message, &allowed);
    if let Some(span) = error.span() {
        issue.place(text, span);
    }
    issue
}

/// Takes away what a path leads to, or the least around it that can be; whether there was something.
fn remove(table: &mut DeTable<'_>, path: &[String]) -> bool {
    let Some((name, below)) = path.split_first() else {
        return false;
    };
    let inside = match table.get_mut(name.as_str()).map(Spanned::get_mut) {
        Some(DeValue::Table(table)) => remove(table, below),
        Some(DeValue::Array(items)) => below.split_first().is_some_and(|(index, below)| {
            let item = index
                .parse()
                .ok()
                .and_then(|index: usize| items.get_mut(index));
            match item.map(Spanned::get_mut) {
                Some(DeValue::Table(table)) => remove(table, below),
                _ => false,
            }
        }),
        _ => false,
    };
    inside || table.remove(name.as_str()).is_some()
}

/// serde says "<what>, expected <allowed>" in one breath, and in the words of a programmer; a near miss is named.
fn split_allowed(message: &str) -> (String, String) {
    let message = message.trim().replace('\n', ", ");
    let message = message.replace("unknown field", "unknown key");
    let message = message.replace("missing field", "missing key");
    let Some((what, allowed)) = message.split_once(", expected ") else {
        return (message, String::new());
    };
    let allowed = allowed.trim_start_matches("one of ");
    let mut what = what.to_owned();
    if let Some(wrong) = what
        .split('`')
        .nth(1)
        .filter(|_| what.starts_with("unknown"))
        && let Some(near) = near(wrong, allowed.split('`').skip(1).step_by(2))
    {
        what = format!("{what}; did you mean `{near}`?");
    }
    (in_words(&what), allowed_in_words(allowed))
}

/// What stands in the file, as people who write TOML call it.
fn in_words(what: &str) -> String {
    let kinds = [
        ("integer `", "the whole number `"),
        ("floating point `", "the number `"),
        ("boolean `", "`"),
        ("string \"", "the string \""),
        ("sequence", "a list"),
        ("map", "a table"),
    ];
    let value = ["invalid type: ", "invalid value: "]
        .iter()
        .find_map(|prefix| what.strip_prefix(prefix));
    let told = value.and_then(|value| {
        let told = |(kind, word): &(&str, &str)| {
            let rest = value.strip_prefix(kind)?;
            Some(format!("{word}{rest} cannot stand here"))
        };
        kinds.iter().find_map(told)
    });
    told.unwrap_or_else(|| what.to_owned())
}

/// What the type in the code takes, for those who do not know it.
fn allowed_in_words(allowed: &str) -> String {
    let words = match allowed {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number, 0 or more",
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number",
        "f32" | "f64" => "a number",
        "a boolean" => "true or false",
        "a string" | "path string" => "a string, in quotes",
        "a sequence" => "a list, in brackets",
        "a map" => "a table",
        _ if allowed.starts_with("struct ") => "a table",
        other => other,
    };
    words.to_owned()
}

/// The name that was probably meant; none when all are far from what was written.
pub(super) fn near<'a>(wrong: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let nearest = names.into_iter().min_by_key(|name| distance(wrong, name));
    nearest.filter(|name| distance(wrong, name) <= 1 + wrong.len() / 4)
}

/// Levenshtein distance in characters.
fn distance(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.chars().collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (i, a) in left.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, b) in right.iter().enumerate() {
            let substituted = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[right.len()]
}

/// Where the value of a dotted key stands; the nearest table above it when the key is not there.
fn span_of(text: &str, key: &str) -> Option<Range<usize>> {
    let table = DeTable::parse(text).ok()?;
    let segments: Vec<&str> = key.split('.').collect();
    span_in(table.get_ref(), &segments)
}

fn span_in(table: &DeTable<'_>, segments: &[&str]) -> Option<Range<usize>> {
    // A plugin id may hold dots, so the longest name that exists is tried first.
    for taken in (1..=segments.len()).rev() {
        let name = segments[..taken].join(".");
        let Some((key, value)) = table.iter().find(|(key, _)| key.get_ref().as_ref() == name)
        else {
            continue;
        };
        return value_span(value.get_ref(), &segments[taken..]).or_else(|| {
            let whole = matches!(value.get_ref(), DeValue::Table(_)) || taken < segments.len();
            Some(if whole { key.span() } else { value.span() })
        });
    }
    None
}

fn value_span(value: &DeValue<'_>, rest: &[&str]) -> Option<Range<usize>> {
    let (first, below) = rest.split_first()?;
    match value {
        DeValue::Table(table) => span_in(table, rest),
        DeValue::Array(items) => {
            let item = items.get(first.parse::<usize>().ok()?)?;
            value_span(item.get_ref(), below).or_else(|| Some(item.span()))
        }
        _ => None,
    }
}

/// The names that lead to the key whose name or value covers a byte of the text.
fn collect_key(table: &DeTable<'_>, at: usize, path: &mut Vec<String>) -> bool {
    for (key, value) in table {
        path.push(key.get_ref().to_string());
        let inside = match value.get_ref() {
            DeValue::Table(table) => collect_key(table, at, path),
            DeValue::Array(items) => items.iter().enumerate().any(|(index, item)| {
                path.push(index.to_string());
                let inside = match item.get_ref() {
                    DeValue::Table(table) => collect_key(table, at, path),
                    _ => item.span().contains(&at),
                };
                if !inside {
                    path.pop();
                }
                inside
            }),
            _ => false,
        };
        if inside || key.span().contains(&at) || value.span().contains(&at) {
            return true;
        }
        path.pop();
    }
    false
}
