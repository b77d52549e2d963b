//! A suite: a folder with `cases.jsonl` and pictures, hostile until it is checked.
//!
//! Every case and every picture is looked at before anything is asked. Nothing outside the folder is
//! opened, whatever paths and links say. Pictures are read again when they are needed, so a suite may
//! be larger than memory.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::case::{Case, CaseError};
use crate::images::data_url::sniff;

/// The cases of a suite, one JSON object a line.
pub const CASES_FILE: &str = "cases.jsonl";
/// Largest `cases.jsonl`, in bytes.
pub const CASES_BYTES_MAX: u64 = 16 << 20;
/// Most cases of a suite.
pub const CASES_MAX: usize = 10_000;
/// Longest line, in bytes.
const LINE_BYTES_MAX: usize = 64 << 10;
/// Mistakes that are told at once.
const ISSUES_TOLD_MAX: usize = 20;
/// What tells the kinds of pictures apart is in that many leading bytes.
const SNIFFED_BYTES: u64 = 16;

/// A checked suite.
#[derive(Clone, Debug)]
pub struct Suite {
    /// As it was named.
    pub folder: PathBuf,
    /// At least one, with unique ids, in the order of the file.
    pub cases: Vec<Case>,
    /// The folder with its links followed.
    root: PathBuf,
    picture_bytes_max: u64,
}

/// One mistake in a suite.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issue {
    /// Line of `cases.jsonl`, from 1; none when the file as a whole is wrong.
    pub line: Option<usize>,
    /// The key, such as `images[0]`; empty when no key is wrong.
    pub key: String,
    /// Lower case, one sentence.
    pub message: String,
}

/// Why a suite was refused: its file of cases, and at least one mistake.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct SuiteError {
    /// The file of cases, as it was named.
    pub file: PathBuf,
    /// What is wrong, in the order of the file.
    pub issues: Vec<Issue>,
}

impl fmt::Display for SuiteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.file.display();
        for (index, issue) in self.issues.iter().take(ISSUES_TOLD_MAX).enumerate() {
            let start = if index > 0 { "\n" } else { "" };
            write!(f, "{start}error: {file}")?;
            if let Some(line) = issue.line {
                write!(f, ":{line}")?;
            }
            if !issue.key.is_empty() {
                write!(f, " ({})", issue.key)?;
            }
            // Names of a hostile suite do not steer the terminal.
            let plain = |c: char| if c.is_control() { '\u{FFFD}' } else { c };
            write!(
                f,
                ": {}",
                issue.message.chars().map(plain).collect::<String>()
            )?;
        }
        match self.issues.len().saturating_sub(ISSUES_TOLD_MAX) {
            0 => Ok(()),
            more => write!(f, "\nand {more} more"),
        }
    }
}

impl Suite {
    /// Reads and checks a folder; `picture_bytes_max` bounds one encoded picture.
    ///
    /// # Errors
    /// Every mistake with its line and key.
    pub fn load(folder: &Path, picture_bytes_max: u64) -> Result<Self, SuiteError> {
        let whole = |message: String| SuiteError {
            file: folder.join(CASES_FILE),
            issues: vec![Issue {
                line: None,
                key: String::new(),
                message,
            }],
        };
        let root = folder
            .canonicalize()
            .map_err(|error| whole(format!("the suite's folder cannot be read: {error}")))?;
        let text = read(&root, CASES_FILE, CASES_BYTES_MAX).map_err(whole)?;
        let text = String::from_utf8(text).map_err(|_| whole("is not UTF-8".to_owned()))?;
        let mut suite = Self {
            folder: folder.to_owned(),
            cases: Vec::new(),
            root,
            picture_bytes_max,
        };
        let issues = suite.take_lines(&text);
        if !issues.is_empty() {
            return Err(SuiteError {
                file: folder.join(CASES_FILE),
                issues,
            });
        }
        match suite.cases.len() {
            0 => Err(whole("has no cases".to_owned())),
            count if count > CASES_MAX => {
                Err(whole(format!("has {count} cases; {CASES_MAX} are allowed")))
            }
            _ => Ok(suite),
        }
    }

    /// The encoded bytes of a picture that a case names.
    ///
    /// # Errors
    /// Why it cannot be used, though it could when the suite was checked.
    pub fn picture(&self, image: &str) -> Result<Vec<u8>, String> {
        read(&self.root, image, self.picture_bytes_max)
    }

    /// The categories, each once, in alphabetical order.
    #[must_use]
    pub fn categories(&self) -> BTreeSet<&str> {
        self.cases
            .iter()
            .map(|case| case.category.as_str())
            .collect()
    }

    /// Reads every line that is not blank; hands back what is wrong.
    fn take_lines(&mut self, text: &str) -> Vec<Issue> {
        let mut issues = Vec::new();
        let mut lines_by_id = BTreeMap::new();
        for (index, line) in text.lines().enumerate() {
            if line.trim().is_empty() {
                continue;
            }
            match self.take_line(line, index + 1, &mut lines_by_id) {
                Ok(case) => self.cases.push(case),
                Err(CaseError { key, message }) => issues.push(Issue {
                    line: Some(index + 1),
                    key,
                    message,
                }),
            }
        }
        issues
    }

    fn take_line(
        &self,
        line: &str,
        number: usize,
        lines_by_id: &mut BTreeMap<String, usize>,
    ) -> Result<Case, CaseError> {
        if line.len() > LINE_BYTES_MAX {
            let message = format!("has {} bytes; {LINE_BYTES_MAX} are allowed", line.len());
            return Err(CaseError::at("", message));
        }
        let case = Case::parse(line)?;
        if let Some(first) = lines_by_id.insert(case.id.clone(), number) {
            let message = format!("{:?} is the id of line {first} already", case.id);
            return Err(CaseError::at("id", message));
        }
        for (index, image) in case.images.iter().enumerate() {
            check_picture(&self.root, image, self.picture_bytes_max).map_err(|message| {
                CaseError::at(format!("images[{index}]"), format!("{image:?} {message}"))
            })?;
        }
        Ok(case)
    }
}

/// Whether it is a picture of an allowed size, from its first bytes; decoding it is the server's part.
fn check_picture(root: &Path, image: &str, bytes_max: u64) -> Result<(), String> {
    let mut head = Vec::new();
    open(root, image, bytes_max)?
        .take(SNIFFED_BYTES)
        .read_to_end(&mut head)
        .map_err(|error| format!("cannot be read: {error}"))?;
    match picture_type(&head) {
        Some(_) => Ok(()),
        None => Err("is not a JPEG, PNG or WebP picture".to_owned()),
    }
}

/// The media type of a picture this server reads; none for anything else.
#[must_use]
pub fn picture_type(bytes: &[u8]) -> Option<&'static str> {
    let sniffed = sniff(bytes);
    let known = ["image/jpeg", "image/png", "image/webp"];
    known.contains(&sniffed).then_some(sniffed)
}

fn read(root: &Path, name: &str, bytes_max: u64) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    // A file may grow while it is read.
    open(root, name, bytes_max)?
        .take(bytes_max)
        .read_to_end(&mut bytes)
        .map_err(|error| format!("cannot be read: {error}"))?;
    Ok(bytes)
}

/// Opens an ordinary file that lies below `root` when all links are followed.
fn open(root: &Path, name: &str, bytes_max: u64) -> Result<File, String> {
    let unreadable = |error: std::io::Error| format!("cannot be read: {error}");
    let path = root.join(name).canonicalize().map_err(unreadable)?;
    if !path.starts_with(root) {
        return Err("leads out of the suite's folder".to_owned());
    }
    // Opening a pipe would wait for its other end.
    let metadata = path.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        return Err("is not a file".to_owned());
    }
    if metadata.len() > bytes_max {
        let bytes = metadata.len();
        return Err(format!("has {bytes} bytes; {bytes_max} are allowed"));
    }
    File::open(path).map_err(unreadable)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PNG: &[u8] = b"\x89PNG\r\n\x1a\n and the rest";

    fn folder(cases: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(CASES_FILE), cases).unwrap();
        std::fs::write(folder.path().join("a.png"), PNG).unwrap();
        folder
    }

    fn case(id: &str, image: &str) -> String {
        format!(
            r#"{{"id":"{id}","category":"c","images":["{image}"],"question":"q","accept":["a"]}}"#
        )
    }

    #[track_caller]
    fn refused(folder: &Path, says: &str) {
        let error = Suite::load(folder, 64).expect_err(says);
        let said = error.to_string();
        assert!(said.contains(says), "{said}");
        assert!(said.contains(CASES_FILE), "{said}");
    }

    #[test]
    fn a_folder_of_cases_and_pictures_is_a_suite() {
        let folder = folder(&format!(
            "{}\n\n{}\n",
            case("1", "a.png"),
            case("2", "a.png")
        ));
        let suite = Suite::load(folder.path(), 64).unwrap();
        assert_eq!(suite.cases.len(), 2);
        assert_eq!(suite.categories().into_iter().collect::<Vec<_>>(), ["c"]);
        assert_eq!(suite.picture("a.png").unwrap(), PNG);
    }

    #[test]
    fn every_mistake_is_told_with_its_line() {
        let lines = [case("1", "a.png"), "{}".to_owned(), case("1", "a.png")];
        let folder = folder(&lines.join("\n"));
        refused(folder.path(), "cases.jsonl:2 (");
        refused(
            folder.path(),
            "cases.jsonl:3 (id): \"1\" is the id of line 1 already",
        );
        std::fs::write(folder.path().join(CASES_FILE), "{}\n".repeat(30)).unwrap();
        refused(folder.path(), "\nand 10 more");
    }

    #[test]
    fn what_is_no_suite_says_so() {
        refused(Path::new("no-such-folder"), "folder cannot be read");
        refused(tempfile::tempdir().unwrap().path(), "cannot be read");
        refused(folder("\n").path(), "has no cases");
        refused(folder(&"x".repeat(70_000)).path(), "70000 bytes; 65536");
        let folder = folder("");
        std::fs::write(folder.path().join(CASES_FILE), b"\xFF").unwrap();
        refused(folder.path(), "is not UTF-8");
    }

    #[test]
    fn pictures_are_there_small_and_pictures() {
        let folder = folder(&case("1", "b.png"));
        refused(
            folder.path(),
            "cases.jsonl:1 (images[0]): \"b.png\" cannot be read",
        );
        std::fs::write(folder.path().join("b.png"), "text").unwrap();
        refused(folder.path(), "is not a JPEG, PNG or WebP picture");
        std::fs::write(folder.path().join("b.png"), PNG.repeat(9)).unwrap();
        refused(folder.path(), "189 bytes; 64 are allowed");
        std::fs::remove_file(folder.path().join("b.png")).unwrap();
        std::fs::create_dir(folder.path().join("b.png")).unwrap();
        refused(folder.path(), "is not a file");
    }

    #[cfg(unix)]
    #[test]
    fn a_link_does_not_lead_out() {
        let outside = folder("");
        let secret = outside.path().join("a.png");
        let folder = folder(&case("1", "b.png"));
        let link = folder.path().join("b.png");
        std::os::unix::fs::symlink(&secret, &link).unwrap();
        refused(folder.path(), "leads out of the suite's folder");
        std::fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink(folder.path().join("a.png"), &link).unwrap();
        assert!(
            Suite::load(folder.path(), 64).is_ok(),
            "a link inside it is fine"
        );
        std::fs::remove_file(folder.path().join(CASES_FILE)).unwrap();
        std::os::unix::fs::symlink(
            outside.path().join(CASES_FILE),
            folder.path().join(CASES_FILE),
        )
        .unwrap();
        refused(folder.path(), "leads out of the suite's folder");
    }

    /// What the documentation shows is what is read.
    #[test]
    fn the_documented_cases_are_cases() {
        let told = include_str!("../../../../tests/suite/README.md");
        let examples = told.split("```json\n").nth(1).unwrap();
        let examples = examples.split("```").next().unwrap();
        assert!(examples.lines().count() >= 3);
        for line in examples.lines() {
            Case::parse(line).unwrap_or_else(|error| panic!("{line}: {error:?}"));
        }
        for (name, _) in crate::eval::Rule::ALL {
            assert!(told.contains(&format!("`{name}`")), "{name} is not told");
        }
    }
}
