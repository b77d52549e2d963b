//! `file:` URLs below one folder: opened step by step, so that no link leads out of it.

use std::fs::File;
use std::io::Read;
use std::path::{Component, Path};

use bytes::Bytes;
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use url::{Host, Url};

/// Why a file is not read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum FileError {
    /// It may not be read, or is not there.
    Refused(String),
    /// It is longer than the limit.
    TooLarge(String),
}

/// The bytes of the regular file that a `file:` URL names, at most `bytes_max` of them.
///
/// Every folder on the way is opened from the one before without following links, so that a link
/// that appears while this runs changes nothing.
///
/// # Errors
/// What is in the way, and which key it is about.
pub(super) fn read(text: &str, root: &Path, bytes_max: u64) -> Result<Bytes, FileError> {
    if root.as_os_str().is_empty() {
        return Err(refused(
            "this server does not read files that clients name (images.files_root turns that on)",
        ));
    }
    let url = Url::parse(text).map_err(|_| refused("the file URL is malformed"))?;
    let here = matches!(url.host(), None | Some(Host::Domain("localhost")));
    let path = here.then(|| url.to_file_path().ok()).flatten();
    let path = path.ok_or_else(|| refused("the file URL does not name a file of this machine"))?;
    let below = path.strip_prefix(root).map_err(|_| outside())?;
    let file = open_below(root, below)?;
    let metadata = file
        .metadata()
        .map_err(|_| refused("the file cannot be read"))?;
    if !metadata.is_file() {
        return Err(refused("the file URL does not name a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(bytes_max.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(|_| refused("the file cannot be read"))?;
    if bytes.len() as u64 > bytes_max {
        return Err(FileError::TooLarge(format!(
            "the file is larger than {bytes_max} bytes (images.bytes_max)"
        )));
    }
    Ok(Bytes::from(bytes))
}

fn open_below(root: &Path, below: &Path) -> Result<File, FileError> {
    let folder = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    let mut at = openat(CWD, root, folder, Mode::empty())
        .map_err(|_| refused("the folder of images.files_root cannot be opened"))?;
    let mut names = below.components().peekable();
    while let Some(component) = names.next() {
        let Component::Normal(name) = component else {
            return Err(outside());
        };
        // Not blocking: a pipe that nobody writes to must not hold the request.
        let flags = if names.peek().is_some() {
            folder | OFlags::NOFOLLOW
        } else {
            OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC
        };
        at = openat(&at, name, flags, Mode::empty()).map_err(not_opened)?;
    }
    Ok(File::from(at))
}

fn not_opened(error: Errno) -> FileError {
    match error {
        Errno::LOOP => refused("links below images.files_root are not followed"),
        Errno::NOENT => refused("there is no such file below images.files_root"),
        // A link in the place of a folder, or a file: the two cannot be told apart here.
        Errno::NOTDIR => refused("a part of the path below images.files_root is not a folder"),
        _ => refused("the file cannot be opened"),
    }
}

fn outside() -> FileError {
    refused("files are read only below the folder of images.files_root")
}

fn refused(message: &str) -> FileError {
    FileError::Refused(message.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    const MAX: u64 = 64;

    /// A folder `root` with a picture in it, beside a `secret` that must stay where it is.
    fn place() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("root/sub")).unwrap();
        fs::write(folder.path().join("root/a b.png"), b"picture").unwrap();
        fs::write(folder.path().join("root/sub/b.png"), b"below").unwrap();
        fs::write(folder.path().join("secret"), b"secret").unwrap();
        fs::create_dir(folder.path().join("root2")).unwrap();
        fs::write(folder.path().join("root2/c.png"), b"beside").unwrap();
        folder
    }

    fn get(folder: &Path, below: &str) -> Result<Bytes, FileError> {
        let base = folder.display();
        read(&format!("file://{base}/{below}"), &folder.join("root"), MAX)
    }

    #[track_caller]
    fn refused(folder: &Path, below: &str, says: &str) {
        match get(folder, below) {
            Err(FileError::Refused(message)) => {
                assert!(message.contains(says), "{below}: {message}");
            }
            other => panic!("{below}: {other:?}"),
        }
    }

    #[test]
    fn files_below_the_root_are_read_and_no_others() {
        let folder = place();
        let path = folder.path();
        assert_eq!(get(path, "root/a%20b.png").unwrap(), "picture");
        assert_eq!(get(path, "root/sub/b.png").unwrap(), "below");
        assert_eq!(get(path, "root/sub/../a b.png").unwrap(), "picture");
        let outside = "only below the folder of images.files_root";
        for attack in [
            "secret",
            "root/../secret",
            "root/%2e%2e/secret",
            "root/..%2fsecret",
            "root/sub/..%2f..%2fsecret",
            "root/%2e%2e%2fsecret",
            "root2/c.png",
            "root",
        ] {
            let answer = get(path, attack);
            assert!(matches!(answer, Err(FileError::Refused(_))), "{attack}");
        }
        refused(path, "secret", outside);
        refused(path, "root/sub/..%2f..%2fsecret", outside);
        refused(path, "root/none.png", "no such file");
        refused(path, "root/sub", "regular file");
        refused(path, "root/a%20b.png/x", "not a folder");
        refused(path, "root/a%00b", "cannot be opened");
    }

    #[test]
    fn links_are_not_followed_wherever_they_stand() {
        let folder = place();
        let path = folder.path();
        symlink(path.join("secret"), path.join("root/link.png")).unwrap();
        symlink("../secret", path.join("root/relative.png")).unwrap();
        symlink("/", path.join("root/up")).unwrap();
        symlink("sub", path.join("root/inside")).unwrap();
        refused(path, "root/link.png", "links");
        refused(path, "root/relative.png", "links");
        let through = format!("root/up{}/secret", path.display());
        refused(path, &through, "not a folder");
        refused(path, "root/inside/b.png", "not a folder");
    }

    #[test]
    fn pipes_and_long_files_are_refused_at_once() {
        let folder = place();
        let path = folder.path();
        let made = std::process::Command::new("mkfifo")
            .arg(path.join("root/pipe"))
            .status();
        assert!(made.unwrap().success());
        refused(path, "root/pipe", "regular file");
        fs::write(path.join("root/long"), [0; 65]).unwrap();
        let long = get(path, "root/long");
        assert!(matches!(long, Err(FileError::TooLarge(_))), "{long:?}");
        fs::write(path.join("root/fits"), [0; 64]).unwrap();
        assert_eq!(get(path, "root/fits").unwrap().len(), 64);
    }

    #[test]
    fn only_this_machine_is_meant_and_only_when_a_root_is_set() {
        let folder = place();
        let root = folder.path().join("root");
        let path = format!("{}/sub/b.png", root.display());
        assert!(read(&format!("file://localhost{path}"), &root, MAX).is_ok());
        for host in ["evil.example", "127.0.0.1"] {
            assert!(read(&format!("file://{host}{path}"), &root, MAX).is_err());
        }
        let off = read(&format!("file://{path}"), Path::new(""), MAX);
        assert!(matches!(off, Err(FileError::Refused(message)) if message.contains("files_root")));
    }
}
